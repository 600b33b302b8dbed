"""Oracle: sums by hand of a ledger written with a fake clock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from ds_lightning.cost import Ledger, Price, ledger_report, ledger_table

SECOND = 1_000_000_000
PRICE = Price(device="toy", usd_per_device_hour=2.0, date="2026-01-01", source="test")


def write(folder: Path) -> None:
    now = [0]
    ledger = Ledger.open(
        folder / "ledger.jsonl", PRICE, num_devices=8, clock=lambda: now[0], started_ns=0, background=False
    )
    now[0] += 3600 * SECOND
    ledger.enter("train")
    now[0] += 3 * 3600 * SECOND
    ledger.close()


def test_the_report_holds_hours_shares_and_dollars(tmp_path: Path) -> None:
    write(tmp_path)
    report = json.loads(json.dumps(ledger_report(tmp_path)))
    assert report["phases"]["startup"] == {"seconds": 3600, "device_hours": 8, "share": 0.25, "usd": 16}
    assert report["phases"]["train"] == {"seconds": 10800, "device_hours": 24, "share": 0.75, "usd": 48}
    assert (report["wall_seconds"], report["device_hours"], report["usd"]) == (14400, 32, 64)
    assert (report["chain"], report["records"], report["attempts"]) == ("ok", 2, 1)
    assert report["attempt_seconds"] == {"1": 14400}
    assert report["terms"][0]["usd_per_device_hour"] == 2.0


def test_the_table_shows_the_same(tmp_path: Path) -> None:
    write(tmp_path)
    console = Console(width=100, record=True, file=(tmp_path / "out").open("w"))
    console.print(ledger_table(ledger_report(tmp_path)))
    words = console.export_text().split()
    for word in ("startup", "25.0%", "16", "train", "75.0%", "48", "total", "32", "64", "ok"):
        assert word in words


def test_what_only_the_heartbeat_knows_is_counted_and_said(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "ledger.jsonl", PRICE, background=False)
    ledger.enter("train")
    ledger._beat()
    report = ledger_report(tmp_path)
    ledger.close()
    assert report["unwritten_seconds"] > 0
    assert "heartbeat only" in str(ledger_table(report).caption)


def test_the_folder_of_a_recipe_has_a_row_a_stage_and_the_sums_of_all(tmp_path: Path) -> None:
    for folder in (tmp_path / "zero", tmp_path / "base", tmp_path):
        write(folder)
    report = json.loads(json.dumps(ledger_report(tmp_path)))
    assert set(report["stages"]) == {"zero", "base"}
    assert report["between"]["usd"] == report["stages"]["base"]["usd"] == 64
    assert (report["wall_seconds"], report["device_hours"], report["usd"]) == (3 * 14400, 96, 192)
    assert report["phases"]["train"] == {"seconds": 3 * 10800, "device_hours": 72, "share": 0.75, "usd": 144}
    assert (report["records"], report["attempts"], report["chain"]) == (6, 3, "ok")
    console = Console(width=100, record=True, file=(tmp_path / "out").open("w"))
    console.print(ledger_table(report))
    words = console.export_text().split()
    for word in ("zero", "base", "between", "33.3%", "192", "96"):
        assert word in words


def test_a_damaged_ledger_of_a_stage_is_found(tmp_path: Path) -> None:
    for folder in (tmp_path / "base", tmp_path):
        write(folder)
    path = tmp_path / "base" / "ledger.jsonl"
    path.write_text(path.read_text().replace("3600", "3601"))
    with pytest.raises(ValueError, match="base"):
        ledger_report(tmp_path)


def test_a_folder_without_a_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no ledger.jsonl, expected the folder of a run"):
        ledger_report(tmp_path)
