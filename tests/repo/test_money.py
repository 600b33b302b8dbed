"""Every figure of the page on money. The oracle is what the commands that the page shows print."""

import re
from pathlib import Path

import pytest

from ds_lightning.cli import main
from ds_lightning.cost import PHASES
from tests.cost.finished_run import write_recorded_pretraining

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "money.md").read_text(encoding="utf-8")
FIGURE = re.compile(r"(?<![\w-])\d(?:[\d,.]*\d)?")


def section_of(title: str) -> tuple[str, list[str]]:
    """Return a section of the page, and the commands that it shows."""
    section = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]
    return section, re.findall(r"^ {4}ds-lightning (.*)$", section, flags=re.MULTILINE)


def figures_of(section: str) -> list[str]:
    """Return the figures of its prose: not those of commands, links and code."""
    prose = re.sub(r"^ {4}.*$|`[^`]*`|\([^)]*\.json\)", "", section, flags=re.MULTILINE)
    return FIGURE.findall(prose)


@pytest.fixture
def pretraining(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the recorded pretraining run, and a terminal that is wide enough."""
    write_recorded_pretraining(tmp_path / "runs" / "pretrain")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.usefixtures("pretraining")
@pytest.mark.parametrize("title", ["How a dollar is counted", "Plan against actual"])
def test_every_figure_on_a_run_is_printed_by_the_commands_above_it(
    title: str, capsys: pytest.CaptureFixture[str]
) -> None:
    section, commands = section_of(title)
    for command in commands:
        assert main(command.split()) == 0
    printed = FIGURE.findall(capsys.readouterr().out)
    shown = figures_of(section)
    assert len(shown) >= 4
    assert not [figure for figure in shown if figure not in printed]


@pytest.mark.parametrize("title", ["What is in it, and what is not", "A budget"])
def test_what_is_said_without_a_command_has_no_figures(title: str) -> None:
    section, _ = section_of(title)
    assert len(section) > 300
    assert figures_of(section) in ([], ["3"])  # the exit status


def test_the_phases_of_the_page_are_those_of_the_ledger() -> None:
    section, _ = section_of("How a dollar is counted")
    rows = re.findall(r"^\| ([a-z, ]+?) \|", section, flags=re.MULTILINE)[1:]
    assert [phase for row in rows for phase in row.split(", ")] == list(PHASES)


def test_every_figure_on_audits_is_printed_by_the_commands_above_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    section, commands = section_of("How to read an audit")
    monkeypatch.setenv("COLUMNS", "200")
    assert commands == ["audit deepseek-v3", "audit deepseek-r1", "audit template"]
    for command in commands[:2]:
        assert main(command.split()) == 0
    printed = set(FIGURE.findall(capsys.readouterr().out))
    assert {"208,000", "1,543.2", "18.9"} <= printed
    shown = [figure for figure in FIGURE.findall(section) if figure != "1"]  # "above 1" is no result
    assert len(shown) > 25
    assert not [figure for figure in shown if figure not in printed]
