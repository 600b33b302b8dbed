"""Oracle: the budget of the command line is the recipe's, or one line says why not."""

from pathlib import Path
from typing import Any

import pytest

from tests.cli.command_line import CommandLine
from tests.recipes.test_runner import STAGES, write


def test_the_budget_of_the_command_line_is_the_recipes(own: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def run(*_: Any, **options: Any) -> int:
        given.append(options["limits"])
        return 0

    monkeypatch.setattr("ds_lightning.recipes.runner.run_recipe", run)
    for options in (["--budget.usd", "2.5"], ["--budget.usd", "2", "--budget.hours", "3"], []):
        assert own("recipe", "r.yaml", *options).status == 0
    assert given == [{"usd": 2.5}, {"usd": 2.0, "hours": 3.0}, {}]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--budget.hours", "-1", "r.yaml: budget.hours is -1.0, expected a number above 0"),
        ("--budget.usd", "nan", "budget.usd is 'nan', expected float"),
        ("--budget.hour", "1", "budget.hour: no such key; did you mean hours?"),
    ],
)
def test_a_budget_that_cannot_be_is_named(
    option: str, value: str, message: str, own: CommandLine, tmp_path: Path
) -> None:
    write(tmp_path, budget={"shares": {stage["name"]: 1 for stage in STAGES}})
    said = own("recipe", tmp_path / "r.yaml", option, value)
    assert said.status == 2
    [line] = said.err
    assert message in line
