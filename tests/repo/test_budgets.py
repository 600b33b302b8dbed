"""How large and how plain the code may be. The oracle is the source itself, read as text and as a syntax tree."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE_LINES, FUNCTION_LINES, SHORT_LINES = 400, 60, {".yaml": 60, "scripts": 150}

EXCEPTIONS: dict[str, str] = {}
"""Paths that may break a rule of this file, with the reason."""

PYTHON = sorted(
    path
    for folder in ("ds_lightning", "callbacks", "scripts", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if "callbacks" not in path.relative_to(ROOT).parts[1:2] or folder == "tests"  # the link repeats the folder
)
SCRIPTS = sorted(path for path in [*(ROOT / "scripts").iterdir(), ROOT / ".ci" / "run"] if path.is_file())
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PROSE = sorted(
    [
        *ROOT.glob("*.md"),
        *(path for folder in ("docs", "ds_lightning", "configs") for path in (ROOT / folder).rglob("*.md")),
    ]
)
JOBS = sorted(path for path in [ROOT / ".dockerignore", *(ROOT / "docker").rglob("*")] if path.is_file())
OTHERS = [*JOBS, ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "constraints.txt"]

FORBIDDEN_CODE = {
    r"\b(TODO|FIXME|XXX)\b": "an intention, expected what the code does",
    r"[^\x00-\x7f]": "not ASCII",
}
FORBIDDEN_EVERYWHERE = {
    r"(?<![\w.$}])/(work|root|home|Users|opt)/\w": "a path of one machine",
    r"\b(pypi\.org|pythonhosted\.org|download\.pytorch\.org)\b": "a package index, which is the user's to choose",
}
EVERYTHING = ("Exception", "BaseException")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def found(paths: list[Path], patterns: dict[str, str]) -> Iterator[str]:
    """Yield where a pattern occurs, and what is wrong with it."""
    for path in paths:
        if name(path) in EXCEPTIONS or path == Path(__file__).resolve():  # this file spells out what it forbids
            continue
        for number, line in enumerate(lines(path), start=1):
            for pattern, reason in patterns.items():
                if match := re.search(pattern, line):
                    yield f"{name(path)}:{number}: {match.group()!r}: {reason}"


def nodes() -> Iterator[tuple[Path, ast.AST]]:
    """Yield every node of every syntax tree, with its file."""
    for path in PYTHON:
        if name(path) not in EXCEPTIONS:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                yield path, node


def catches_everything(handler: ast.ExceptHandler) -> bool:
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(one is None or (isinstance(one, ast.Name) and one.id in EVERYTHING) for one in caught)


def raises_again(handler: ast.ExceptHandler) -> bool:
    return isinstance(handler.body[-1], ast.Raise)


def test_files_fit_in_one_sitting() -> None:
    budgets = [(path, SHORT_LINES["scripts"] if path in SCRIPTS else FILE_LINES) for path in {*PYTHON, *SCRIPTS}]
    budgets += [(path, SHORT_LINES[".yaml"]) for path in CONFIGS]
    assert not [
        f"{name(path)}: {len(lines(path))} lines, expected at most {budget}"
        for path, budget in sorted(budgets)
        if len(lines(path)) > budget and name(path) not in EXCEPTIONS
    ]


def test_functions_fit_on_a_screen() -> None:
    long = []
    for path, node in nodes():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                long.append(f"{name(path)}: {node.name} has {length} lines, expected at most {FUNCTION_LINES}")
    assert not long


def test_what_nobody_foresaw_is_passed_on() -> None:
    assert not [
        f"{name(path)}:{node.lineno}: catches everything and does not raise it again, expected the exception meant"
        for path, node in nodes()
        if isinstance(node, ast.ExceptHandler) and catches_everything(node) and not raises_again(node)
    ]


def test_modules_are_named_for_what_they_hold() -> None:
    shapeless = re.compile(r"^(utils?|common|helpers?|misc|core|base)$")
    assert not [name(path) for path in PYTHON if any(map(shapeless.match, Path(name(path)).with_suffix("").parts))]


def test_code_is_plain() -> None:
    assert not list(found([*PYTHON, *SCRIPTS, *CONFIGS, *JOBS], FORBIDDEN_CODE))


def test_nothing_names_one_machine_or_one_package_index() -> None:
    paths = [*PYTHON, *SCRIPTS, *CONFIGS, *PROSE, *OTHERS]
    assert not list(found([path for path in paths if path != Path(__file__).resolve()], FORBIDDEN_EVERYWHERE))


@pytest.mark.parametrize(
    "line", ["x = 1  # TODO later", "# FIXME", "open('/home/me/x')", "caf\u00e9", "host = 'pypi.org'"]
)
def test_a_line_that_is_forbidden_is_found(tmp_path: Path, line: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(line, encoding="utf-8")
    assert [*found([path], {**FORBIDDEN_CODE, **FORBIDDEN_EVERYWHERE})]


@pytest.mark.parametrize(
    ("caught", "passed_on"),
    [("except Exception: pass", False), ("except: pass", False), ("except (KeyError, BaseException): raise", True)],
)
def test_a_handler_of_everything_is_recognised(caught: str, passed_on: bool) -> None:
    (handler,) = (node for node in ast.walk(ast.parse(f"try: pass\n{caught}")) if isinstance(node, ast.ExceptHandler))
    assert catches_everything(handler)
    assert raises_again(handler) is passed_on


def test_an_exception_has_a_reason_and_a_file() -> None:
    assert not [path for path, reason in EXCEPTIONS.items() if not reason or not (ROOT / path).is_file()]
