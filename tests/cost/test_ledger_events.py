"""Any sequence of events on a ledger. The oracle is a dictionary: nanoseconds by terms, added up as the clock moves.

A killed process loses what no beat has noted, a power cut what no record holds; nothing else is lost, gained, moved to
another price, or left unverifiable.
"""

from __future__ import annotations

import datetime
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ds_lightning.cost import PHASES, Ledger, Price, iter_ledger, ledger_report, read_ledger
from ds_lightning.cost.ledger import _open_ledgers
from ds_lightning.cost.records import Terms

NANOSECONDS = st.integers(min_value=0, max_value=10**13)
PRICES = st.builds(
    Price,
    device=st.sampled_from(["toy", "other"]),
    usd_per_device_hour=st.sampled_from([0.0, 2.0, 3600.0]),
    market=st.sampled_from(["on-demand", "spot"]),
    date=st.sampled_from(["2026-01-01", "2026-02-02"]),
    source=st.just("test"),
)


class Events(RuleBasedStateMachine):
    """A run folder, at most one process in it, and what its ledger should hold."""

    @initialize()
    def folder(self) -> None:
        self.temporary = tempfile.TemporaryDirectory()
        self.path = Path(self.temporary.name) / "ledger.jsonl"
        self.now = 10**15
        self.wall = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
        fake = SimpleNamespace(UTC=datetime.UTC, datetime=SimpleNamespace(now=lambda zone: self.wall))
        self.patched = patch("ds_lightning.cost.journal.datetime", fake)
        self.patched.start()
        self.ledger: Ledger | None = None
        self.terms: Terms | None = None
        self.spent: Counter[Terms] = Counter()
        self.beaten: Counter[Terms] = Counter()  # what survives the process
        self.written: Counter[Terms] = Counter()  # what survives the machine
        self.attempts, self.records = 0, 0
        self.checkpoint: dict[str, Any] | None = None
        self.synced_checkpoint: dict[str, Any] | None = None

    def teardown(self) -> None:
        if hasattr(self, "temporary"):
            if self.ledger is not None:
                self.ledger.close()
            self.patched.stop()
            self.temporary.cleanup()

    def write(self) -> None:
        """Expect that a record holds all there is."""
        self.beaten, self.written = self.spent.copy(), self.spent.copy()
        self.synced_checkpoint = self.checkpoint

    @precondition(lambda self: self.ledger is None)
    @rule(price=PRICES, devices=st.integers(1, 9), startup=NANOSECONDS)
    def start(self, price: Price, devices: int, startup: int) -> None:
        self.terms = Terms(price.device, devices, price.usd_per_device_hour, price.date, price.market)
        self.now += startup
        self.ledger = Ledger.open(
            self.path,
            price,
            num_devices=devices,
            clock=lambda: self.now,
            started_ns=self.now - startup,
            background=False,
        )
        self.attempts += 1
        assert self.ledger.attempt == self.attempts
        self.spent[self.terms] += startup
        self.write()

    @precondition(lambda self: self.ledger is not None)
    @rule(phase=st.sampled_from(PHASES), nanoseconds=NANOSECONDS)
    def work(self, phase: str, nanoseconds: int) -> None:
        assert self.ledger is not None
        assert self.terms is not None
        self.ledger.enter(phase)
        self.now += nanoseconds
        self.spent[self.terms] += nanoseconds

    @precondition(lambda self: self.ledger is not None)
    @rule()
    def flush(self) -> None:
        assert self.ledger is not None
        self.ledger.progress(step=self.records, tokens=self.now)
        assert self.ledger.flush()
        self.write()

    @precondition(lambda self: self.ledger is not None)
    @rule()
    def beat(self) -> None:
        assert self.ledger is not None
        self.ledger._beat()
        self.beaten = self.spent.copy()

    @precondition(lambda self: self.ledger is not None)
    @rule()
    def save(self) -> None:
        assert self.ledger is not None
        self.checkpoint = self.ledger.state()

    @precondition(lambda self: self.ledger is not None and self.checkpoint is not None)
    @rule()
    def resume(self) -> None:
        assert self.ledger is not None
        assert self.checkpoint is not None
        self.ledger.resume_from(self.checkpoint)
        self.write()

    @rule(days=st.integers(-400, 400))
    def set_the_wall_clock(self, days: int) -> None:
        self.wall += datetime.timedelta(days=days)

    @precondition(lambda self: self.ledger is not None)
    @rule(price=PRICES)
    def second_writer(self, price: Price) -> None:
        before = self.path.read_bytes()
        with pytest.raises(ValueError, match=r"is in use by process \d+ on "):
            Ledger.open(self.path, price, background=False)
        assert self.path.read_bytes() == before

    @precondition(lambda self: self.ledger is not None)
    @rule()
    def close(self) -> None:
        assert self.ledger is not None
        self.ledger.close()
        self.ledger = None
        self.write()

    @precondition(lambda self: self.ledger is not None)
    @rule()
    def kill(self) -> None:
        self.die()
        if self.beaten != self.spent:
            self.checkpoint = self.synced_checkpoint  # a later one may know of time that nothing else does
        self.spent = self.beaten.copy()

    @precondition(lambda self: self.ledger is not None)
    @rule(torn=st.floats(0, 1), beat=st.booleans())
    def cut_the_power(self, torn: float, beat: bool) -> None:
        self.die()
        last = self.path.read_bytes().splitlines(keepends=True)[-1]
        with self.path.open("ab") as file:
            file.write(last[: round(torn * (len(last) - 2))])  # neither the closing brace nor the newline
        heartbeat = self.path.with_suffix(".heartbeat")
        heartbeat.write_bytes(heartbeat.read_bytes()[:20] if beat else b"\0" * 2048)
        self.checkpoint = self.synced_checkpoint
        self.spent, self.beaten = self.written.copy(), self.written.copy()

    def die(self) -> None:
        """Leave the files as they are, and their lock to the next."""
        assert self.ledger is not None
        self.ledger.closed = True
        self.ledger._heartbeat.close(remove=False)
        self.ledger._journal.close()
        _open_ledgers.discard(self.ledger)
        self.ledger = None

    @invariant()
    def sums_are_conserved(self) -> None:
        if self.ledger is not None:
            book = self.ledger._book_now()
            assert {terms: sum(times.values()) for terms, times in book.items()} == self.spent
            hours = {terms: nanoseconds * terms.num_devices / 3.6e12 for terms, nanoseconds in self.spent.items()}
            usd = sum(hours[terms] * terms.usd_per_device_hour for terms in hours)
            assert self.ledger.totals().device_hours == pytest.approx(sum(hours.values()))
            assert self.ledger.totals().usd == pytest.approx(usd)
        elif self.path.is_file():
            seconds = ledger_report(self.path.parent)["wall_seconds"]
            assert seconds == pytest.approx(sum(self.beaten.values()) / 1e9, rel=1e-12)

    @invariant()
    def the_file_is_verified_and_only_grows(self) -> None:
        if not self.path.is_file():
            return
        file = read_ledger(self.path)
        assert {terms: sum(times.values()) for terms, times in file.book.items()} == self.written
        assert all(nanoseconds >= 0 for times in file.book.values() for nanoseconds in times.values())
        assert file.records >= self.records
        self.records = file.records
        attempts = [record["attempt"] for record in iter_ledger(self.path) if record["event"] == "open"]
        assert attempts == list(range(1, self.attempts + 1))


Events.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestEvents = Events.TestCase
