"""Oracles: a fake clock whose elapsed time is known, sums by hand, and sequences of phases drawn at random."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning.cost import PHASES, Ledger, Price, iter_ledger, read_ledger

SECOND = 1_000_000_000
DOLLAR = Price(device="toy", usd_per_device_hour=3600.0, date="2026-01-01", source="test")  # one dollar a second
FIVE = Price(device="toy2", usd_per_device_hour=18000.0, market="spot", date="2026-02-02", source="test")


class Clock:
    """Nanoseconds that move only when told."""

    def __init__(self) -> None:
        self.now = 1000 * SECOND

    def __call__(self) -> int:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += round(seconds * SECOND)


def start(path: Path, clock: Clock, price: Price = DOLLAR, num_devices: int = 1) -> Ledger:
    return Ledger.open(
        path, price, num_devices=num_devices, clock=clock, started_ns=clock.now - 2 * SECOND, background=False
    )


def spend(ledger: Ledger, clock: Clock, phase: str, seconds: float) -> None:
    ledger.enter(phase)
    clock.sleep(seconds)


def test_phases_sum_to_the_time_since_the_process_began(tmp_path: Path) -> None:
    clock = Clock()
    ledger = start(tmp_path / "ledger.jsonl", clock)
    clock.sleep(1)
    assert ledger.enter("data") == "startup"
    clock.sleep(0.5)
    assert ledger.enter("train") == "data"
    clock.sleep(4)
    with ledger.phase("checkpoint"):
        assert ledger.current_phase == "checkpoint"
        clock.sleep(0.25)
    assert ledger.current_phase == "train"
    clock.sleep(0.25)
    assert ledger.totals().seconds == {"startup": 3, "data": 0.5, "train": 4.25, "checkpoint": 0.25}
    ledger.close()
    assert read_ledger(tmp_path / "ledger.jsonl").totals.seconds == {
        "startup": 3,
        "data": 0.5,
        "train": 4.25,
        "checkpoint": 0.25,
    }


def test_a_phase_ends_with_its_block_even_when_the_block_fails(tmp_path: Path) -> None:
    clock = Clock()
    ledger = start(tmp_path / "ledger.jsonl", clock)
    with pytest.raises(KeyError), ledger.phase("export"):
        raise KeyError
    assert ledger.current_phase == "startup"
    ledger.close()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(
                st.sampled_from([*PHASES, "flush", "save", "resume"]), st.integers(min_value=0, max_value=10**13)
            ),
            max_size=12,
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_sequence_of_phases_flushes_and_resumes_sums_to_the_elapsed_time(
    attempts: list[list[tuple[str, int]]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, clock, elapsed = Path(folder) / "ledger.jsonl", Clock(), 0
        state = None
        for steps in attempts:
            ledger = start(path, clock)
            elapsed += 2 * SECOND
            for name, nanoseconds in steps:
                if name == "flush":
                    ledger.flush()
                elif name == "save":
                    state = ledger.state()
                elif name == "resume" and state is not None:
                    ledger.resume_from(json.loads(json.dumps(state)))
                elif name in PHASES:
                    ledger.enter(name)
                clock.now += nanoseconds
                elapsed += nanoseconds
                assert ledger.totals().wall_seconds == pytest.approx(elapsed / 1e9, rel=1e-12)
            ledger.close()
        file = read_ledger(path)
        assert sum(sum(times.values()) for times in file.book.values()) == elapsed
        assert sum(file.attempt_nanoseconds.values()) == elapsed
        assert all(nanoseconds >= 0 for times in file.book.values() for nanoseconds in times.values())


def test_every_record_carries_terms_time_and_the_hash_of_the_one_before(tmp_path: Path) -> None:
    clock = Clock()
    ledger = start(tmp_path / "ledger.jsonl", clock, num_devices=8)
    spend(ledger, clock, "train", 1)
    ledger.progress(step=3, tokens=96)
    ledger.flush()
    ledger.close()
    ledger.close()
    records = list(iter_ledger(tmp_path / "ledger.jsonl"))
    assert [record["event"] for record in records] == ["open", "flush", "close"]
    assert [record["prev"] for record in records[1:]] == [record["hash"] for record in records[:-1]]
    assert records[1]["progress"] == {"step": 3, "tokens": 96}
    for record in records:
        assert record["attempt"] == 1
        assert (record["device"], record["num_devices"], record["usd_per_device_hour"]) == ("toy", 8, 3600.0)
        assert (record["price_date"], record["market"]) == ("2026-01-01", "on-demand")
        assert record["time"].endswith("+00:00")


def test_price_and_devices_may_change_between_attempts(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "ledger.jsonl"
    first = start(path, clock, DOLLAR, num_devices=2)
    spend(first, clock, "train", 10)
    first.close()
    second = start(path, clock, FIVE, num_devices=4)
    spend(second, clock, "train", 3)
    second.close()
    totals = read_ledger(path).totals
    assert second.attempt == 2
    assert totals.seconds == {"startup": 4, "train": 13}
    assert totals.device_hours_by_phase["train"] * 3600 == pytest.approx(2 * 10 + 4 * 3)
    assert totals.usd_by_phase["train"] == pytest.approx(2 * 10 * 1 + 4 * 3 * 5)
    assert totals.usd == pytest.approx(2 * 12 * 1 + 4 * 5 * 5)


def test_work_after_the_checkpoint_is_lost_and_the_wall_clock_stays(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "ledger.jsonl"
    first = start(path, clock)
    spend(first, clock, "train", 10)
    first.enter("checkpoint")
    state = first.state()
    clock.sleep(1)
    spend(first, clock, "data", 2)
    spend(first, clock, "train", 5)
    spend(first, clock, "export", 4)
    first.close()
    second = start(path, clock)
    clock.sleep(1)
    assert second.resume_from(state) == 7
    expected = {"startup": 5, "train": 10, "checkpoint": 1, "export": 4, "lost": 7}
    assert second.totals().seconds == expected
    assert second.resume_from(state) == 0
    assert second.totals().seconds == expected
    spend(second, clock, "train", 5)
    second.close()
    assert read_ledger(path).totals.seconds == {**expected, "train": 15}
    lost = [record for record in iter_ledger(path) if record["event"] == "lost"]
    assert len(lost) == 1
    assert lost[0]["seconds"] == {"data": -2, "train": -5, "lost": 7}


def test_resuming_twice_from_one_checkpoint_loses_each_second_once(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "ledger.jsonl"
    ledger = start(path, clock)
    spend(ledger, clock, "train", 10)
    state = ledger.state()
    clock.sleep(5)
    for lost_before in (5, 5 + 8):
        ledger.close()
        ledger = start(path, clock)
        ledger.resume_from(state)
        assert ledger.totals().seconds["lost"] == lost_before
        assert ledger.totals().seconds["train"] == 10
        spend(ledger, clock, "train", 8)
    ledger.close()


def test_what_an_attempt_did_before_it_resumed_is_not_lost(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "ledger.jsonl"
    first = start(path, clock)
    spend(first, clock, "train", 10)
    state = first.state()
    first.close()
    second = start(path, clock)
    spend(second, clock, "validate", 3)
    assert second.resume_from(state) == 0
    assert second.totals().seconds == {"startup": 4, "train": 10, "validate": 3}
    second.close()


def test_going_back_within_an_attempt_loses_what_it_did_since(tmp_path: Path) -> None:
    clock = Clock()
    ledger = start(tmp_path / "ledger.jsonl", clock)
    spend(ledger, clock, "train", 10)
    state = ledger.state()
    clock.sleep(3)
    ledger.flush()
    clock.sleep(2)
    assert ledger.resume_from(state) == 5
    clock.sleep(1)
    assert ledger.totals().seconds == {"startup": 2, "train": 11, "lost": 5}
    ledger.close()


def test_lost_work_keeps_the_price_it_was_done_at(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "ledger.jsonl"
    first = start(path, clock, DOLLAR)
    spend(first, clock, "train", 10)
    state = first.state()
    clock.sleep(10)
    first.close()
    second = start(path, clock, FIVE)
    second.resume_from(state)
    second.close()
    totals = read_ledger(path).totals
    assert totals.usd_by_phase["train"] == pytest.approx(10)
    assert totals.usd_by_phase["lost"] == pytest.approx(10)
    assert totals.usd == pytest.approx(2 + 20 + 2 * 5)


def test_going_back_to_a_later_checkpoint_undoes_the_loss(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "ledger.jsonl"
    first = start(path, clock)
    spend(first, clock, "train", 10)
    early = first.state()
    clock.sleep(10)
    late = first.state()
    first.close()
    second = start(path, clock)
    assert second.resume_from(early) == 10
    spend(second, clock, "train", 3)
    second.close()
    third = start(path, clock)
    third.resume_from(late)
    assert third.totals().seconds["train"] == 20
    assert third.totals().seconds["lost"] == 3
    third.close()


def test_seconds_known_to_the_checkpoint_alone_are_booked(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "ledger.jsonl"
    first = start(path, clock)
    spend(first, clock, "train", 10)
    state = first.state()
    first.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:50])  # the power went before the record of those ten seconds
    second = start(path, clock)
    second.resume_from(state)
    assert second.totals().seconds == {"startup": 4, "train": 10}
    second.close()


def test_a_checkpoint_of_another_ledger_moves_nothing_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    other = start(tmp_path / "a" / "ledger.jsonl", clock)
    spend(other, clock, "train", 10)
    state = other.state()
    other.close()
    ledger = start(tmp_path / "b" / "ledger.jsonl", clock)
    with caplog.at_level(logging.WARNING):
        assert ledger.resume_from(state) == 0
    assert "comes from another ledger" in caplog.text
    assert ledger.totals().seconds == {"startup": 2}
    ledger.close()


def test_a_ledger_that_was_shortened_does_not_take_the_checkpoint(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "ledger.jsonl"
    first = start(path, clock)
    spend(first, clock, "train", 10)
    first.flush()
    state = first.state()
    first.close()
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    second = start(path, clock)
    with pytest.raises(ValueError, match=r"has 2 records, but .* after record 2 .* not among them; restore the file"):
        second.resume_from(state)
    second.close()


def test_an_unknown_phase_and_no_devices_are_refused(tmp_path: Path) -> None:
    ledger = start(tmp_path / "ledger.jsonl", Clock())
    with pytest.raises(ValueError, match="phase is 'lunch', expected one of startup, data, train"):
        ledger.enter("lunch")
    ledger.close()
    with pytest.raises(ValueError, match="num_devices is 0, expected at least 1"):
        Ledger.open(tmp_path / "b.jsonl", DOLLAR, num_devices=0)


def test_a_second_ledger_of_one_process_does_not_book_its_start_again(tmp_path: Path) -> None:
    first = Ledger.open(tmp_path / "a.jsonl", DOLLAR)
    first.close()
    second = Ledger.open(tmp_path / "b.jsonl", DOLLAR)
    assert second.totals().seconds["startup"] < 0.5
    second.close()
