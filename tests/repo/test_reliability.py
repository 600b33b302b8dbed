"""What ``docs/reliability.md`` names. The oracles: the files of tests, as Python parses them."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def is_soak(node: ast.FunctionDef | ast.Module) -> bool:
    """Whether all of a test, or of a file of tests, is marked as soak."""
    if isinstance(node, ast.Module):
        return any(
            ast.unparse(line) == "pytestmark = pytest.mark.soak" for line in node.body if isinstance(line, ast.Assign)
        )
    return any(ast.unparse(decorator) == "pytest.mark.soak" for decorator in node.decorator_list)


def test_every_test_that_is_named_exists_and_is_soak_where_that_is_said() -> None:
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)( \(\*soak\*\))?", PAGE)
    assert len(named) > 40
    for path, name, soak in named:
        module = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        found = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == name]
        assert len(found) == 1, f"{path} has {len(found)} tests of the name {name}"
        assert (is_soak(module) or is_soak(found[0])) == bool(soak), f"{path}::{name}"


def test_every_file_that_is_named_exists() -> None:
    files = set(re.findall(r"tests/[\w/]+\.py", PAGE))
    assert files
    assert not [file for file in files if not (ROOT / file).is_file()]


def test_the_twelve_and_the_seven_are_all_there() -> None:
    twelve, seven = PAGE.partition("## Twelve things")[2].split("## What Lightning")
    assert [int(number) for number in re.findall(r"^\| (\d+) \|", twelve, flags=re.MULTILINE)] == list(range(1, 13))
    rows = [int(number) for number in re.findall(r"^\| (\d+) \|", seven, flags=re.MULTILINE)]
    traps = (ROOT / "tests" / "training" / "test_traps.py").read_text(encoding="utf-8")
    assert rows == sorted({int(number) for number in re.findall(r"^def test_trap_(\d)_", traps, flags=re.MULTILINE)})
