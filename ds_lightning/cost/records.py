"""The ledger's file: one JSON object a line, each holding the hash of the one before it; standard library only.

Seconds are whole nanoseconds inside, so that they add up exactly, and seconds in the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from ds_lightning.cost.prices import Market

PHASES = (
    "startup",
    "data",
    "train",
    "rollout",
    "reward",
    "logprob",
    "validate",
    "checkpoint",
    "export",
    "idle",
    "lost",
)
"""What a device-second can be spent on; ``lost`` is work that had to be done again."""

GRADIENT_PHASES = ("data", "train", "rollout", "reward", "logprob")
"""Phases whose work ends in a step of the optimizer."""

REDONE = (*GRADIENT_PHASES, "validate")
"""Phases whose seconds become ``lost`` when a run goes back to a checkpoint, since their work is done again.

Not ``checkpoint``: writing the very checkpoint that a run goes back to ends after its state was taken.
"""

EVENTS = ("open", "flush", "recovered", "repaired", "lost", "close")
"""Why a record was written."""

ENERGY = ("joules", "metered_devices")
"""Keys of a record whose time was measured: what so many of the devices took."""

NO_HASH = "0" * 64
"""What stands before the first record."""

_KEYS = {
    "seq",
    "time",
    "attempt",
    "event",
    "seconds",
    "device",
    "num_devices",
    "usd_per_device_hour",
    "price_date",
    "market",
    "prev",
    "hash",
}


@dataclass(frozen=True)
class Terms:
    """What the devices are and cost while a record's seconds pass; may change between attempts."""

    device: str
    """Device as in the price list."""
    num_devices: int
    """Devices held at the same time."""
    usd_per_device_hour: float
    """Price of one of them."""
    price_date: str
    """Day of that price."""
    market: str
    """``on-demand`` or ``spot``."""

    def to_dict(self) -> dict[str, Any]:
        """Return the keys of a record."""
        return dict(vars(self))

    @classmethod
    def of(cls, record: dict[str, Any]) -> Terms:
        """Read the terms of a record."""
        return cls(**{key: record[key] for key in cls.__dataclass_fields__})


Book = dict[Terms, dict[str, int]]
"""Nanoseconds by terms and phase."""


@dataclass(frozen=True)
class Totals:
    """Sums over a ledger, by phase, for phases that occurred."""

    seconds: dict[str, float]
    """Wall-clock seconds."""
    device_hours_by_phase: dict[str, float]
    """Wall-clock times devices held."""
    usd_by_phase: dict[str, float]
    """At the prices that were in force."""

    @property
    def wall_seconds(self) -> float:
        """Wall-clock of all attempts."""
        return sum(self.seconds.values())

    @property
    def device_hours(self) -> float:
        """Device-hours of all phases."""
        return sum(self.device_hours_by_phase.values())

    @property
    def usd(self) -> float:
        """Dollars of all phases."""
        return sum(self.usd_by_phase.values())

    @classmethod
    def of(cls, book: Book) -> Totals:
        """Price a book."""
        seconds: dict[str, float] = {}
        hours: dict[str, float] = {}
        usd: dict[str, float] = {}
        for phase in PHASES:
            spent = [(terms, times[phase] / 1e9) for terms, times in book.items() if times.get(phase)]
            if spent:
                seconds[phase] = sum(time for _, time in spent)
                hours[phase] = sum(time * terms.num_devices for terms, time in spent) / 3600
                usd[phase] = sum(time * terms.num_devices * terms.usd_per_device_hour for terms, time in spent) / 3600
        return cls(seconds, hours, usd)


@dataclass
class LedgerFile:
    """What a verified ledger file says."""

    records: int = 0
    """Complete records."""
    size: int = 0
    """Bytes that they take; what follows is torn."""
    torn_bytes: int = 0
    """Bytes of an unfinished last line: what a power cut leaves."""
    unterminated: bool = False
    """Whether the last record is whole but lacks its newline."""
    genesis: str = NO_HASH
    """Hash of the first record: the ledger's identity."""
    last_hash: str = NO_HASH
    """Hash of the last record."""
    last_attempt: int = 0
    """Attempt of the last record."""
    last_terms: Terms | None = None
    """Terms of the last record."""
    book: Book = field(default_factory=dict)
    """Nanoseconds by terms and phase."""
    attempt_nanoseconds: dict[int, int] = field(default_factory=dict)
    """Wall-clock of each attempt."""
    joules: float = 0.0
    """Energy that was measured."""
    metered_nanoseconds: int = 0
    """Wall-clock times devices of which the energy was measured."""

    @property
    def totals(self) -> Totals:
        """Seconds, device-hours and dollars by phase."""
        return Totals.of(self.book)

    def add(self, record: dict[str, Any]) -> None:
        """Book one verified record."""
        if not self.records:
            self.genesis = record["hash"]
        self.records += 1
        self.last_hash, self.last_terms = record["hash"], Terms.of(record)
        self.last_attempt = max(self.last_attempt, record["attempt"])
        times = from_seconds(record["seconds"])
        book_into(self.book, self.last_terms, times)
        attempt = record["attempt"]
        self.attempt_nanoseconds[attempt] = self.attempt_nanoseconds.get(attempt, 0) + sum(times.values())
        self.add_energy(record, times)

    def add_energy(self, record: dict[str, Any], times: dict[str, int]) -> None:
        """Book what was measured while the times of a record passed."""
        joules, devices = (record.get(key, 0) for key in ENERGY)
        self.joules += joules
        self.metered_nanoseconds += devices * sum(times.values())


def book_into(book: Book, terms: Terms, times: dict[str, int]) -> None:
    """Add nanoseconds by phase to a book."""
    entry = book.setdefault(terms, {})
    for phase, nanoseconds in times.items():
        entry[phase] = entry.get(phase, 0) + nanoseconds


def to_seconds(times: dict[str, int]) -> dict[str, float]:
    """Return seconds by phase, phases without any left out. Exact both ways for a hundred days."""
    return {phase: times[phase] / 1e9 for phase in PHASES if times.get(phase)}


def from_seconds(seconds: dict[str, float]) -> dict[str, int]:
    """Return nanoseconds by phase."""
    return {phase: round(value * 1e9) for phase, value in seconds.items()}


def record_hash(record: dict[str, Any]) -> str:
    """Return the sha256 of a record without its own hash, over sorted keys and no white space."""
    body = {key: value for key, value in record.items() if key != "hash"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def encode_record(record: dict[str, Any]) -> bytes:
    """Return the line of a record that has its hash."""
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def read_ledger(path: str | Path) -> LedgerFile:
    """Read a ledger and verify every line, its place in the hash chain included; the file is not changed.

    A last line that a power cut left unfinished is reported in the result, not an error.

    Raises:
        ValueError: If a line was changed, removed or inserted; the message names file, line and expectation.
    """
    ledger = LedgerFile()
    for _ in iter_ledger(path, ledger):
        pass
    return ledger


def iter_ledger(path: str | Path, ledger: LedgerFile | None = None) -> Iterator[dict[str, Any]]:
    """Yield the verified records of a ledger in order and add each to ``ledger``.

    Raises:
        ValueError: As :func:`read_ledger`.
    """
    path = Path(path)
    ledger = ledger if ledger is not None else LedgerFile()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            whole = line.endswith(b"\n")
            if not whole and _is_torn(line):
                ledger.torn_bytes = len(line)
                return
            record = _verified(line, ledger, f"{path} line {number}")
            ledger.add(record)
            ledger.size += len(line)
            ledger.unterminated = not whole
            yield record


def _is_torn(line: bytes) -> bool:
    """Tell whether a last line without newline is an unfinished write: no prefix of a record is JSON."""
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


def _verified(line: bytes, ledger: LedgerFile, place: str) -> dict[str, Any]:
    remedy = "restore the file from a copy, or move it away to start a new ledger"
    try:
        record = json.loads(line)
    except ValueError:
        raise ValueError(f"{place} is {line[:40]!r}, expected a JSON object; {remedy}") from None
    if not isinstance(record, dict) or not record.keys() >= _KEYS:
        missing = sorted(_KEYS - record.keys()) if isinstance(record, dict) else sorted(_KEYS)
        raise ValueError(f"{place} lacks {', '.join(missing)}, expected a ledger record; {remedy}")
    expected = record_hash(record)
    if record["hash"] != expected:
        raise ValueError(
            f"{place} was changed: its hash is {str(record['hash'])[:12]}, expected {expected[:12]}; {remedy}"
        )
    if record["prev"] != ledger.last_hash:
        raise ValueError(
            f"{place} follows a record with hash {str(record['prev'])[:12]}, found {ledger.last_hash[:12]} before it: "
            f"lines were removed, inserted or moved; {remedy}"
        )
    _check_values(record, ledger.records, place, remedy)
    return record


def _check_values(record: dict[str, Any], seq: int, place: str, remedy: str) -> None:
    """Refuse values that only a hash recomputed by hand could cover."""
    seconds, devices, usd = record["seconds"], record["num_devices"], record["usd_per_device_hour"]
    numbers = (int, float)
    if record["seq"] != seq:
        found, expected = f"seq {record['seq']!r}", str(seq)
    elif record["event"] not in EVENTS:
        found, expected = f"event {record['event']!r}", f"one of {', '.join(EVENTS)}"
    elif not isinstance(seconds, dict) or not all(
        phase in PHASES and isinstance(value, numbers) for phase, value in seconds.items()
    ):
        found, expected = f"seconds {seconds!r}", f"numbers by phase ({', '.join(PHASES)})"
    elif record["event"] != "lost" and any(value < 0 for value in seconds.values()):
        found, expected = f"seconds {seconds!r}", "none below 0"
    elif not isinstance(devices, int) or devices < 1 or not isinstance(record["attempt"], int):
        found, expected = f"num_devices {devices!r}, attempt {record['attempt']!r}", "whole numbers of at least 1"
    elif not isinstance(usd, numbers) or not usd >= 0 or record["market"] not in get_args(Market):
        found, expected = f"price {usd!r} {record['market']!r}", "at least 0 on-demand or spot"
    elif not all(isinstance(record.get(key, 0), numbers) and record.get(key, 0) >= 0 for key in ENERGY):
        found, expected = " and ".join(f"{key} {record.get(key)!r}" for key in ENERGY), "numbers of at least 0"
    else:
        return
    raise ValueError(f"{place} has {found}, expected {expected}; {remedy}")
