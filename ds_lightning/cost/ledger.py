"""The ledger: every device-second of a run, booked by phase into a file that survives crashes.

A run is always in exactly one phase, so the phases of an attempt sum to its wall-clock, which begins when the process
began. Standard library only.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ds_lightning.cost.energy import SAMPLE_SECONDS, EnergyMeter
from ds_lightning.cost.heartbeat import Heartbeat, process_start_ns, read_heartbeat
from ds_lightning.cost.journal import Entry, Journal
from ds_lightning.cost.prices import Price
from ds_lightning.cost.records import (
    ENERGY,
    PHASES,
    Book,
    Terms,
    Totals,
    book_into,
    from_seconds,
    iter_ledger,
    to_seconds,
)
from ds_lightning.cost.running import Running, moved_back

log = logging.getLogger(__name__)

FLUSH_SECONDS = 8.0
"""Longest time between two records; a power cut loses at most this and the time of a write."""

_HEARTBEAT_SECONDS = 0.05
_BOUNDARY_SECONDS = 1.0
_BOUNDARIES = frozenset({"startup", "validate", "checkpoint", "export"})

_open_ledgers: set[Ledger] = set()
_booked_until: tuple[int, int] | None = None  # process id, nanoseconds: a second ledger must not book them again


class Ledger:
    """The open ledger of a run; made by :meth:`open`.

    All methods may be called from any thread. A full disk does not stop the run: what cannot be written is kept,
    tried again at every flush, and reported in one log line; the heartbeat carries it over to the next attempt.

    Two files: ``ledger.jsonl``, appended to and synced at least every :data:`FLUSH_SECONDS`, and beside it
    ``ledger.heartbeat``, which holds what was not yet appended and lets the next attempt book what a SIGKILL cut off.
    """

    def __init__(
        self,
        journal: Journal,
        terms: Terms,
        clock: Callable[[], int],
        started_ns: int,
        meter: EnergyMeter | None = None,
    ) -> None:
        """Take over a locked and verified file; use :meth:`open`."""
        self.path = journal.path
        self.attempt = journal.found.last_attempt + 1
        self.closed = False
        self._journal = journal
        self._terms = terms
        self._clock = clock
        self._meter = meter
        self._joules_written = 0.0
        self._running = Running("startup", min(started_ns, clock()), {})
        self._book: Book = {terms: dict(times) for terms, times in journal.found.book.items()}
        self._queue: list[Entry] = []
        self._progress: dict[str, Any] = {}
        self._failing = False
        self._boundary = False
        self._state_lock = threading.RLock()
        self._file_lock = threading.RLock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        heartbeat_path = self.path.with_suffix(".heartbeat")
        self._recover(read_heartbeat(heartbeat_path))
        self._earlier: Book = {terms: dict(times) for terms, times in self._book.items()}
        self._heartbeat = Heartbeat(heartbeat_path)
        self._after = journal.last_hash

    @classmethod
    def open(
        cls,
        path: str | Path,
        price: Price,
        *,
        num_devices: int = 1,
        clock: Callable[[], int] = time.monotonic_ns,
        started_ns: int | None = None,
        background: bool = True,
        meter: EnergyMeter | None = None,
    ) -> Ledger:
        """Start an attempt in the phase ``startup``, in a new ledger or at the end of an existing one.

        What an earlier attempt left unwritten when it was killed is booked first; a line that a power cut left
        unfinished is removed, which is logged and recorded.

        Args:
            path: The file, ``RUN_DIR/ledger.jsonl``; its folder is made if need be.
            price: Price of one device from now on.
            num_devices: Devices held from now on.
            clock: Nanoseconds that never run backwards.
            started_ns: Start of the attempt on that clock; none: the start of this process, or the end of the
                ledger that this process closed last.
            background: Flush and beat from a thread. Without it only :meth:`flush` and :meth:`close` write.
            meter: Measures the energy of the devices from now on; none: it is not booked.

        Raises:
            ValueError: If the file was tampered with or is in use, or ``num_devices`` is not positive.
            OSError: If the file cannot be written.
        """
        if num_devices < 1:
            raise ValueError(f"num_devices is {num_devices}, expected at least 1")
        terms = Terms(price.device, num_devices, price.usd_per_device_hour, price.date, price.market)
        journal = Journal(Path(path))
        try:
            begin = started_ns if started_ns is not None else _unbooked_since()
            ledger = cls(journal, terms, clock, begin, meter)
            ledger._write("open", {"source": price.source})
        except BaseException:
            journal.close()
            raise
        _open_ledgers.add(ledger)
        if background:
            ledger._thread = threading.Thread(target=ledger._keep, name="ledger", daemon=True)
            ledger._thread.start()
        return ledger

    @property
    def terms(self) -> Terms:
        """Devices and price in force."""
        return self._terms

    @property
    def current_phase(self) -> str:
        """The phase that the run is in."""
        return self._running.phase

    def enter(self, phase: str) -> str:
        """Go on in a phase and return the one before.

        Raises:
            ValueError: If there is no such phase.
        """
        if phase not in PHASES:
            raise ValueError(f"phase is {phase!r}, expected one of {', '.join(PHASES)}")
        assert not self.closed, "the ledger is closed"
        with self._state_lock:
            previous = self._running.phase
            self._running = self._running.at(self._clock(), phase)
            self._boundary = self._boundary or (previous in _BOUNDARIES and previous != phase)
        return previous

    @contextlib.contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """Book the block under a phase, then go on in the one before.

        Raises:
            ValueError: If there is no such phase.
        """
        previous = self.enter(phase)
        try:
            yield
        finally:
            self.enter(previous)

    def progress(self, *, step: int, tokens: int) -> None:
        """Say how far the run is, for the next records.

        Args:
            step: Optimizer steps done.
            tokens: Training tokens consumed.
        """
        self._progress = {"progress": {"step": step, "tokens": tokens}}

    def totals(self) -> Totals:
        """Return the sums over all attempts, up to this moment."""
        return Totals.of(self._book_now())

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold for :meth:`resume_from`; JSON-ready."""
        with self._file_lock, self._state_lock:
            book = [
                {"terms": terms.to_dict(), "seconds": to_seconds(times)} for terms, times in self._book_now().items()
            ]
            return {
                "genesis": self._journal.genesis,
                "attempt": self.attempt,
                "records": self._journal.records,
                "hash": self._journal.last_hash,
                "book": book,
            }

    def resume_from(self, state: dict[str, Any]) -> float:
        """Move what earlier attempts did after a checkpoint to ``lost`` and return the seconds moved.

        After it the phases of redone work hold of the earlier attempts exactly what the checkpoint knew; the sum over
        all phases stays the wall-clock. Calling it again with the same checkpoint moves only what was booked since.
        A checkpoint of this very attempt (going back without a restart) moves what this attempt did after it.

        Args:
            state: What :meth:`state` returned when the checkpoint was written. A state of another ledger (a run
                continued in a new folder) moves nothing, which is logged.

        Raises:
            ValueError: If records that were written before the checkpoint are missing from this ledger.
        """
        with self._file_lock, self._state_lock:
            if state["genesis"] != self._journal.genesis:
                log.warning("%s: the checkpoint comes from another ledger, whose costs are not counted here", self.path)
                return 0.0
            self._check_holds(state)
            here = state["attempt"] == self.attempt
            base = self._book_now() if here else self._earlier
            known = {Terms(**entry["terms"]): from_seconds(entry["seconds"]) for entry in state["book"]}
            moved = 0
            for terms in [*base, *(terms for terms in known if terms not in base)]:
                times = moved_back(base.get(terms, {}), known.get(terms, {}))
                if not times:
                    continue
                moved += times.get("lost", 0)
                extra = {"checkpoint_records": state["records"], "checkpoint_attempt": state["attempt"]}
                self._queue.append(Entry("lost", self.attempt, terms, times, extra))
                book_into(self._book, terms, times)
                if not here:
                    book_into(self._earlier, terms, times)
        self.flush()
        return moved / 1e9

    def flush(self, event: str = "flush") -> bool:
        """Append what is not yet written and sync it; return whether that worked. A failure is logged once."""
        assert not self.closed, "the ledger is closed"
        with self._file_lock:
            try:
                while self._queue:
                    self._journal.append(self._queue[0])
                    self._queue.pop(0)
                    self._after = self._journal.last_hash
                self._write(event, self._progress)
            except OSError as error:
                if not self._failing:
                    log.warning(
                        "%s: cannot write (%s); the run goes on, its time is kept and tried again", self.path, error
                    )
                self._failing = True
                return False
            if self._failing:
                log.warning("%s: can be written again", self.path)
            self._failing = False
            return True

    def close(self) -> None:
        """Book up to now, write the last record and let the file go; again: nothing. Runs at exit by itself.

        If the last record cannot be written, that is logged, and the heartbeat file stays for the next attempt.
        """
        global _booked_until
        with self._file_lock:
            if self.closed:
                return
            self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._file_lock:
            if self.closed:
                return
            written = self.flush("close")
            if not written:
                self._beat()
                seconds = sum(self._running.unwritten.values()) / 1e9
                log.error("%s: the last %.1f s are only in %s", self.path, seconds, self._heartbeat.path.name)
            self.closed = True
            self._heartbeat.close(remove=written)
            self._journal.close()
            _open_ledgers.discard(self)
            _booked_until = (os.getpid(), time.monotonic_ns())

    def _book_now(self) -> Book:
        with self._state_lock:
            book = {terms: dict(times) for terms, times in self._book.items()}
            book_into(book, self._terms, self._running.at(self._clock()).unwritten)
            return book

    def _write(self, event: str, extra: dict[str, Any]) -> None:
        """Append what is not yet written, as one record."""
        self._measure()
        with self._state_lock:
            self._running = self._running.at(self._clock())
            times = {phase: nanoseconds for phase, nanoseconds in self._running.unwritten.items() if nanoseconds}
            energy = self._unwritten_energy()
        self._journal.append(Entry(event, self.attempt, self._terms, times, {**extra, **energy}))
        with self._state_lock:
            self._joules_written += energy.get("joules", 0.0)
            book_into(self._book, self._terms, times)
            self._running, self._after = self._running.without(times), self._journal.last_hash
            self._beat()

    def _recover(self, beat: dict[str, Any] | None) -> None:
        """Book what the attempt before left in its heartbeat, and say what was torn."""
        found = self._journal.found
        if beat is not None and beat["after"] == found.last_hash:
            times, terms = from_seconds(beat["seconds"]), Terms(**beat["terms"])
            if any(times.values()):
                energy = {key: beat[key] for key in ENERGY if key in beat}
                self._journal.append(Entry("recovered", beat["attempt"], terms, times, energy))
                book_into(self._book, terms, times)
        if found.torn_bytes:
            log.warning("%s: removed an unfinished last line of %d bytes", self.path, found.torn_bytes)
            extra = {"torn_bytes": found.torn_bytes}
            self._journal.append(Entry("repaired", self.attempt, self._terms, {}, extra))

    def _check_holds(self, state: dict[str, Any]) -> None:
        """Refuse a ledger that lacks a record which was on disk when the checkpoint was written."""
        for number, record in enumerate(iter_ledger(self.path), start=1):
            if number == state["records"] and record["hash"] == state["hash"]:
                return
        raise ValueError(
            f"{self.path} has {self._journal.records} records, but the checkpoint was written after record "
            f"{state['records']} ({state['hash'][:12]}), which is not among them; restore the file or resume in a new "
            "run folder"
        )

    def _keep(self) -> None:
        """Beat and flush until the ledger closes."""
        flushed = measured = time.monotonic()
        while not self._stop.wait(_HEARTBEAT_SECONDS):
            if time.monotonic() - measured >= SAMPLE_SECONDS:
                self._measure()
                measured = time.monotonic()
            age = time.monotonic() - flushed
            if age >= (_BOUNDARY_SECONDS if self._boundary else FLUSH_SECONDS):
                self._boundary = False
                self.flush()
                flushed = time.monotonic()
            else:
                self._beat()

    def _beat(self) -> None:
        """Put what is not yet written where a SIGKILL cannot reach it; a full disk is reported by flush."""
        with self._state_lock, contextlib.suppress(OSError):
            self._heartbeat.write(
                {
                    "after": self._after,
                    "attempt": self.attempt,
                    "process": f"process {os.getpid()} on {socket.gethostname()}",
                    "terms": self._terms.to_dict(),
                    "seconds": to_seconds(self._running.at(self._clock()).unwritten),
                    **self._unwritten_energy(),
                }
            )

    def _measure(self) -> None:
        """Read the meter; never under a lock, since a driver may take its time."""
        if self._meter is not None:
            self._meter.read()

    def _unwritten_energy(self) -> dict[str, float]:
        """Return the keys of a record about energy."""
        if self._meter is None:
            return {}
        joules = round(self._meter.joules - self._joules_written, 3)
        return dict(zip(ENERGY, (joules, self._meter.num_devices), strict=True))


def _unbooked_since() -> int:
    if _booked_until is not None and _booked_until[0] == os.getpid():
        return _booked_until[1]
    return process_start_ns()


def _close_all() -> None:
    for ledger in list(_open_ledgers):
        ledger.close()


def _abandon_all() -> None:
    """In a forked child: drop the copies of the parent's files, so that its lock ends when it does."""
    for ledger in list(_open_ledgers):
        ledger.closed = True
        ledger._heartbeat.close(remove=False)
        ledger._journal.close()
    _open_ledgers.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_abandon_all)
