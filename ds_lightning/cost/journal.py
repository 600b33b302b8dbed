"""The ledger's file while it is written: locked, verified when opened, appended to one synced record at a time."""

from __future__ import annotations

import datetime
import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_lightning.cost.heartbeat import read_heartbeat
from ds_lightning.cost.records import Terms, encode_record, read_ledger, record_hash, to_seconds


@dataclass(frozen=True)
class Entry:
    """What a record says, before it has a place in the chain."""

    event: str
    """One of ``EVENTS``."""
    attempt: int
    """Attempt that the seconds belong to."""
    terms: Terms
    """Devices and price in force."""
    times: dict[str, int]
    """Nanoseconds by phase."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More keys of the record."""


class Journal:
    """A ledger file held by this process alone.

    Attributes:
        found: What the file said when it was opened.
        genesis: Hash of the first record.
        last_hash: Hash of the last record.
        records: Complete records.
    """

    def __init__(self, path: Path) -> None:
        """Open or create, lock and verify the file.

        Raises:
            ValueError: If another process or ledger holds it, or it was tampered with; it is then left as it is.
            OSError: If it cannot be opened.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.found = read_ledger(path)
            if self.found.unterminated:
                os.write(self._fd, b"\n")
        except BaseException as error:
            os.close(self._fd)
            if isinstance(error, BlockingIOError):
                beat = read_heartbeat(path.with_suffix(".heartbeat")) or {}
                raise ValueError(
                    f"{path} is in use by {beat.get('process', 'another process')}, expected one run at a time in a "
                    "folder; end that run or choose another folder"
                ) from None
            raise
        self._size = self.found.size + self.found.unterminated
        self.records, self.genesis, self.last_hash = self.found.records, self.found.genesis, self.found.last_hash

    def append(self, entry: Entry) -> None:
        """Write and sync one record, or leave the chain as it was.

        Raises:
            OSError: If the disk is full or fails; the next call removes what was half written.
        """
        record = {
            "seq": self.records,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "attempt": entry.attempt,
            "event": entry.event,
            "seconds": to_seconds(entry.times),
            **entry.terms.to_dict(),
            **entry.extra,
            "prev": self.last_hash,
        }
        record["hash"] = record_hash(record)
        line = encode_record(record)
        if os.fstat(self._fd).st_size != self._size:  # an interrupt or an error left a line behind
            os.ftruncate(self._fd, self._size)
        written = 0
        while written < len(line):
            written += os.write(self._fd, line[written:])
        os.fsync(self._fd)
        self._size += len(line)
        self.records += 1
        self.last_hash = str(record["hash"])
        if self.records == 1:
            self.genesis = self.last_hash

    def close(self) -> None:
        """Let the file and its lock go."""
        os.close(self._fd)
