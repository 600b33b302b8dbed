"""Every figure of the page on money. The oracle is what the commands that the page shows print."""

import re
from pathlib import Path

import pytest

from ds_lightning.cli import main

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "money.md").read_text(encoding="utf-8")
FIGURE = re.compile(r"(?<![\w-])\d(?:[\d,.]*\d)?")


def test_every_figure_on_audits_is_printed_by_the_commands_above_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    section = PAGE.partition("## How to read an audit\n")[2].partition("\n## ")[0]
    monkeypatch.setenv("COLUMNS", "200")
    commands = re.findall(r"^ {4}ds-lightning (.*)$", section, flags=re.MULTILINE)
    assert commands == ["audit deepseek-v3", "audit deepseek-r1", "audit template"]
    for command in commands[:2]:
        assert main(command.split()) == 0
    printed = set(FIGURE.findall(capsys.readouterr().out))
    assert {"208,000", "1,543.2", "18.9"} <= printed
    shown = [figure for figure in FIGURE.findall(section) if figure != "1"]  # "above 1" is no result
    assert len(shown) > 25
    assert not [figure for figure in shown if figure not in printed]
