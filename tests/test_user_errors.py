"""Oracle: reports of a real jsonargparse parser of small classes, and the one line that each should become."""

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from ds_lightning.user_errors import one_line, writing


@dataclass
class Size:
    wide: int
    high: int = 1


class Thing:
    def __init__(self, size: Size, weight: float = 1.0, name: str | None = None) -> None: ...


def said_of(*arguments: str, **config: Any) -> str:
    """Return the line for arguments and a config that do not fit."""
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--count", type=int)
    parser.add_subclass_arguments(Thing, "thing")
    with pytest.raises(ArgumentError) as caught:
        parser.parse_object(config) if config else parser.parse_args(list(arguments))
    line = one_line(str(caught.value), [action.dest for action in parser._actions])
    assert "\n" not in line
    return line


def thing(**values: Any) -> dict[str, Any]:
    return {"class_path": f"{__name__}.Thing", "init_args": {"size": {"wide": 1}, **values}}


def test_a_wrong_type_names_key_value_and_type() -> None:
    assert said_of("--count", "many") == "count is 'many', expected int"
    assert said_of(thing=thing(weight="much")) == "thing.init_args.weight is 'much', expected float"
    assert said_of(thing=thing(size={"wide": "x"})) == "thing.init_args.size.wide is 'x', expected int"


def test_an_unknown_key_names_its_neighbour() -> None:
    assert said_of("--coutn", "3") == "coutn: no such key; did you mean count?"
    assert said_of(thing=thing(wieght=2)) == "thing.init_args.wieght: no such key; did you mean weight?"
    assert (
        said_of(thing=thing(size={"wide": 1, "hihg": 2}))
        == "thing.init_args.size.hihg: no such key; did you mean high?"
    )
    assert said_of(thing=thing(zzz=2)) == "thing.init_args.zzz: no such key"


def test_a_missing_value_is_named_with_its_path() -> None:
    assert said_of(thing=thing(size={"high": 2})).startswith("thing.init_args.size.wide: missing, expected a value")


def test_a_class_that_is_not_there_names_its_module() -> None:
    assert said_of(thing={"class_path": "nope.Thing"}) == "thing.class_path is 'nope.Thing': No module named 'nope'"
    assert said_of(thing={"class_path": "pathlib.Paht"}).endswith("has no attribute 'Paht'; did you mean Path?")
    assert said_of(thing={"class_path": "pathlib.Path"}) == "thing.class_path is 'pathlib.Path', expected a Thing"


def test_what_is_no_class_says_what_one_looks_like() -> None:
    assert said_of(thing=3) == "thing is 3, expected class_path and init_args of a Thing"


def test_an_argument_without_dashes_is_not_expected() -> None:
    assert said_of("count=3") == "argument 'count': not expected, options are --KEY VALUE"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EFBIG, "large")])
def test_an_error_without_a_file_gets_the_folder(error: OSError) -> None:
    with pytest.raises(OSError, match=error.strerror) as caught, writing(Path("run")):
        raise error
    assert (caught.value.filename, caught.value.errno) == ("run", error.errno)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "none", "file"), OSError("no number"), ValueError("other")])
def test_an_error_that_names_its_file_or_is_another_is_left(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, writing("run"):
        raise error
    assert caught.value is error
