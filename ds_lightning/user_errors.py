"""What libraries say of a user's mistake or a full disk, in one line that names the thing."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

_KEY = re.compile(r'Parser key "([^"]+)":')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':")
_STRUCTURE = re.compile(r"Does not validate against any of|Subtypes: |Errors:|Expected a path but|Given value")
_BARE_TYPE = re.compile(r"Expected an? (?!.*Got value)|Expected a dot import path")
_TYPE = re.compile(r"<class '(?:[\w.]+\.)?(\w+)'>|typing\.")


class RunFailedError(RuntimeError):
    """A run that cannot go on, for a reason that one line says; the command ends with status 1."""


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """Name the folder in errors of the file system that name no file, such as most of a full disk.

    Args:
        folder: Where everything is written meanwhile.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        raise


def one_line(message: str, known: Iterable[str] = ()) -> str:
    """Turn a report of jsonargparse into one line.

    The report nests: every level names a key or a class and repeats the whole value that it found. What helps stands
    at the bottom, and the keys on the way there are its path.

    Args:
        message: The report.
        known: Keys that the parser accepts, dotted.
    """
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    path, owner = "", ""
    for number, line in enumerate(lines):
        if match := _KEY.fullmatch(line):
            path = _join(path, match[1])
        elif match := _CLASS.fullmatch(line):
            owner = match[1]
            path = path if is_dataclass(_find(owner)) else _join(path, "init_args")
        elif not _STRUCTURE.match(line) and not _BARE_TYPE.match(line):
            return _explain(line, lines[number + 1 :], path, owner, sorted(known))
    types = next((line for line in reversed(lines) if line.startswith("Subtypes: ")), "").partition(": ")[2]
    value = next((line for line in lines if line.startswith("Given value: ")), "").partition(": ")[2]
    if match := re.match(r"\{'class_path': '([^']*)'", value):
        path, value = f"{path}.class_path", match[1]
    if match := re.match(r"NestedArg\(key='([\w.]+)', val='?(.*?)'?\)$", value):
        return f"{path}.{match[1]} is {match[2]!r} of no class, expected {path}.class_path before it"
    return f"{path} is {value!r}, expected {_plain(types[1:-1])}"


def _explain(line: str, rest: list[str], path: str, owner: str, known: list[str]) -> str:
    """Say what the decisive line of a report means."""
    if match := re.match(r"(?:Group '(.+)' does not accept option|Option) '(.+?)'", line):
        return _unknown(_join(path, match[1] or "", match[2]), _accepted(owner, match[1]))
    if match := re.match(r"unrecognized arguments: (\S+)", line):
        key = match[1].partition("=")[0]
        if not key.startswith("--"):
            return f"argument {key!r}: not expected, options are --KEY VALUE"
        group = key[2:].rpartition(".")[0]
        return _unknown(_join(path, key[2:]), _accepted(owner, group) if owner else _siblings(known, group))
    if match := re.match(r"Subcommand '.+' does not accept option '(.+)'", line):
        parts = match[1].split(".")
        depth = next(
            n for n in range(len(parts)) if not _siblings(known, ".".join(parts[: n + 1])) or n + 1 == len(parts)
        )
        return _unknown(".".join(parts[: depth + 1]), _siblings(known, ".".join(parts[:depth])))
    if match := re.match(r"the following arguments are required: (.+)", line):
        missing = (_join(path, re.sub(r"^(fit|validate|test|predict)\.", "", key)) for key in match[1].split(", "))
        return f"{', '.join(missing)}: missing, expected a value in the config or on the command line"
    if match := re.match(r"Expected an? (.+)\. Got value: (.*)", line):
        return f"{path} is {match[2]!r}, expected {_plain(match[1])}"
    if match := re.match(r"Not a valid subclass of (\w+)", line):
        value = next(text for text in rest if text.startswith("Given value: ")).removeprefix("Given value: ")
        return f"{path} is {value:.80}, expected class_path and init_args of a {match[1]}"
    if match := re.match(r"Import path (\S+) does not correspond to a subclass of (\w+)", line):
        return f"{path}.class_path is {match[1]!r}, expected a {match[2]}"
    if owner and _find(owner) is None:
        module, _, name = owner.rpartition(".")
        path = _join(path.removesuffix(".init_args").removesuffix("init_args"), "class_path")
        return f"{path} is {owner!r}: {line}{_meant(name, dir(sys.modules.get(module)))}"
    if line.startswith("Unable to load config"):
        detail = " ".join(rest[: next((n for n, text in enumerate(rest) if _BARE_TYPE.match(text)), len(rest))])
        line += f", {'expected a YAML file with its keys' if detail.startswith('Parser key') else detail}"
    return f"{path}: {_plain(line)}" if path else _plain(line)


def _unknown(key: str, accepted: list[str]) -> str:
    return f"{key}: no such key{_meant(key.rpartition('.')[2], accepted)}"


def _meant(name: str, accepted: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(accepted), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _accepted(owner: str, group: str | None) -> list[str]:
    """Parameters of a class, or of the class of one of its parameters."""
    kind = _find(owner)
    if group and kind is not None:
        kind = get_type_hints(kind.__init__).get(group)
    if not isinstance(kind, type):
        return []
    constructors = [vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)]
    return [name for constructor in constructors for name in signature(constructor).parameters]


def _siblings(known: list[str], group: str) -> list[str]:
    """The names that follow a dotted key, or those at the top."""
    start = f"{group}." if group else ""
    return sorted({key.removeprefix(start).partition(".")[0] for key in known if key.startswith(start)})


def _find(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(import_module(module), name, None)
    except (ImportError, ValueError):  # no such module, or no dot in the path
        return None


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _plain(types: str) -> str:
    """Write types as in YAML."""
    return _TYPE.sub(lambda match: {"NoneType": "null"}.get(match[1], match[1] or ""), types)
