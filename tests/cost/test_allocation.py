"""Oracle: the clock, and a ledger whose records were written at times that the test chose."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ds_lightning.cost import Ledger, Price
from ds_lightning.cost.allocation import START, unbooked_allocation_ns

DOLLAR = Price(device="toy", usd_per_device_hour=3600.0, date="2026-01-01", source="test")


def test_a_run_is_booked_from_the_start_of_its_allocation_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    monkeypatch.setenv(START, str(int(time.time()) - 100))
    began = unbooked_allocation_ns(path)
    assert began is not None
    ledger = Ledger.open(path, DOLLAR, started_ns=began, background=False)
    assert 100 <= ledger.totals().seconds["startup"] < 110
    ledger.close()
    assert unbooked_allocation_ns(path) is None, "another attempt within this job"
    time.sleep(1.1)
    monkeypatch.setenv(START, str(int(time.time())))
    assert unbooked_allocation_ns(path) is not None, "the next job"


@pytest.mark.parametrize("told", [None, "", "yesterday", "-5", "99999999999"])
def test_an_environment_that_does_not_tell_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str | None
) -> None:
    monkeypatch.delenv(START, raising=False)
    if told is not None:
        monkeypatch.setenv(START, told)
    message = f"^cost.from_allocation is true and {START} is {told or ''!r}, expected the start of a Slurm job"
    with pytest.raises(ValueError, match=message):
        unbooked_allocation_ns(tmp_path / "ledger.jsonl")
