"""Oracle: the figures put in and the ledger's own report, found again in the file and in the printed table."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ds_lightning.cost import Ledger, find_price
from ds_lightning.cost.ledger_report import ledger_report
from ds_lightning.summary import read_report, summary_table, write_report

FIGURES: dict[str, Any] = {
    "name": "pretrain",
    "tokens": 4096,
    "parameters": 1234,
    "active_parameters": 567,
    "bits_per_byte": {"gzip_9": 1.75, "model": 1.5},
    "val_loss": 3.0,
    "samples": ["once upon [bold]a time"],
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder whose ledger has 2 seconds of training, 1 of data and 5 of validation, at 3.6 dollars an hour."""
    now = [0]
    price = find_price("mine", usd_per_device_hour=3.6)
    ledger = Ledger.open(tmp_path / "run" / "ledger.jsonl", price, clock=lambda: now[0], started_ns=0, background=False)
    for phase, seconds in (("train", 2), ("data", 1), ("validate", 5)):
        ledger.enter(phase)
        now[0] += seconds * 10**9
    ledger.close()
    return tmp_path / "run"


def test_the_report_holds_the_figures_and_the_cost(run: Path) -> None:
    report = write_report(run, FIGURES)
    [stage] = report["stages"]
    assert {name: stage[name] for name in FIGURES} == FIGURES
    assert stage["tokens_per_second"] == pytest.approx(4096 / 3)  # neither validation nor start-up is work on tokens
    assert stage["usd"] == pytest.approx(8 * 3.6 / 3600)
    assert stage["device_hours"] == pytest.approx(8 / 3600)
    assert report["ledger"] == ledger_report(run)
    assert read_report(run) == report
    assert json.loads((run / "report.json").read_text()) == report
    assert sorted(path.name for path in run.iterdir()) == ["ledger.jsonl", "report.json"]


def test_a_run_without_training_has_no_speed(tmp_path: Path) -> None:
    Ledger.open(tmp_path / "ledger.jsonl", find_price("cpu"), background=False).close()
    assert write_report(tmp_path, FIGURES)["stages"][0]["tokens_per_second"] == 0.0


def test_the_table_shows_every_figure_and_the_sample_as_it_is(run: Path) -> None:
    console = Console(width=100, record=True, quiet=False, file=(run / "out").open("w"))
    console.print(summary_table(write_report(run, FIGURES)))
    text = console.export_text()
    assert "4,096 tokens, 1,365 a second; 1,234 parameters, 567 active" in text
    for row in ("gzip_9", "1.750", "model", "1.500", "train", "validate", "once upon [bold]a time"):
        assert row in text


def test_a_damaged_report_is_refused(run: Path) -> None:
    (run / "report.json").write_text('{"stages": [')
    with pytest.raises(ValueError, match=r"report\.json is not JSON .*: delete it, the next run writes it anew"):
        read_report(run)


def test_a_full_disk_leaves_the_earlier_report(run: Path) -> None:
    write_report(run, FIGURES)
    before = (run / "report.json").read_bytes()
    (run / "report.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        write_report(run, FIGURES)
    assert (run / "report.json").read_bytes() == before
