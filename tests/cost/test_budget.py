"""Oracle: sums by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_lightning.cost import Ledger, Price
from ds_lightning.cost.budget import Limit, Mark, Pace, limits, shortest_start, tightest
from ds_lightning.cost.records import Totals


def test_a_limit_is_what_devices_cost_by_the_second() -> None:
    usd, hours = limits(20.0, 9.0, spent_usd=5.0, spent_hours=6.0, devices=8, price=2.0)
    assert (usd.name, usd.total, usd.spent, hours.name, hours.total, hours.spent) == ("usd", 20, 5, "hours", 9, 6)
    assert (usd.per_second, hours.per_second) == pytest.approx((16 / 3600, 8 / 3600))
    assert tightest([usd, hours]) is hours
    assert limits(None, None, spent_usd=5.0, spent_hours=6.0, devices=8, price=2.0) == []


def test_progress_is_what_is_spent_of_what_is_not_kept_back() -> None:
    limit = Limit("usd", 100.0, 45.0, 0.1)
    assert limit.progress(0) == 0.45
    assert limit.progress(100) == 0.5
    assert limit.progress(550) == 1.0
    assert limit.progress(1000) == float("inf")
    assert Limit("usd", 100.0, 0.0, 0.0).progress(1e9) == 0.0, "devices that cost nothing"


def test_the_margin_is_half_a_percent_or_four_seconds() -> None:
    assert Limit("usd", 1000.0, 0.0, 0.5).margin == 10.0
    assert Limit("usd", 100.0, 0.0, 0.5).margin == 4.0
    assert Limit("usd", 100.0, 0.0, 0.0).margin == 0.0


def test_the_end_is_samples_saves_and_a_validation() -> None:
    pace = Pace(batch=0.5, answers=2.0, samples=3.0, save=4.0)
    assert pace.validation(6) == 5.0
    assert pace.validation(6, growth=5.0) == 13.0
    assert pace.closing(6, growth=5.0) == 3 + 2 * 4 + 13
    unknown = Pace()
    unknown.steps.extend([1.0, 9.0, 2.0])
    assert unknown.step == 2.0, "one hiccup does not count"
    assert unknown.closing(6) == 2 * 2 + 6 * 2


def test_what_was_measured_survives_a_checkpoint() -> None:
    pace, other = Pace(batch=0.5, save=4.0), Pace()
    pace.steps.extend(range(100))
    other.restore(json.loads(json.dumps(pace.state())))
    assert other == pace
    other.steps.append(7.0)
    assert len(other.steps) == 64


def test_samples_are_what_validations_leave_of_their_phase() -> None:
    seconds = {"startup": 9.0, "data": 1.0, "train": 2.0, "rollout": 3.0, "validate": 5.0, "lost": 7.0}
    assert Mark.of(Totals(seconds, {}, {})) == Mark(working=6.0, validate=5.0, checkpoint=0.0)


def test_the_shortest_start_of_a_run_is_read_from_its_ledger(tmp_path: Path) -> None:
    path, now = tmp_path / "ledger.jsonl", 10**12
    price = Price(device="toy", usd_per_device_hour=1.0, date="2026-01-01", source="test")
    for seconds in (9, 5, 7):
        ledger = Ledger.open(path, price, clock=lambda: now, started_ns=now - seconds * 10**9, background=False)
        ledger.enter("train")
        ledger.flush()
        ledger.close()
    assert shortest_start(path) == 5.0
