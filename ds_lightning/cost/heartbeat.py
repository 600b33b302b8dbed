"""What survives a SIGKILL: a small file rewritten many times a second, and the time at which a process began."""

from __future__ import annotations

import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

_IMPORTED = time.monotonic_ns()
_SIZE = 2048


class Heartbeat:
    """A file that holds the latest of many states; a write lands in the page cache, which outlives the process.

    A plain write and not a memory map: on a full disk a write fails with an error, where a store to a mapped page
    would end the process. Nothing is synced, so a power cut may leave an old or a torn state: a checksum tells.
    """

    def __init__(self, path: Path) -> None:
        """Create or truncate the file.

        Raises:
            OSError: If the file cannot be written.
        """
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self, state: dict[str, Any]) -> None:
        """Replace the state.

        Raises:
            OSError: If the file cannot be written.
        """
        body = json.dumps(state, separators=(",", ":"))
        line = f"{zlib.crc32(body.encode()):08x} {body}\n".encode().ljust(_SIZE)
        os.pwrite(self._fd, line, 0)

    def close(self, *, remove: bool) -> None:
        """Close the file, and delete it when its state is no longer needed."""
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)


def read_heartbeat(path: Path) -> dict[str, Any] | None:
    """Return the last state in the file; none if there is no file or its checksum does not hold."""
    try:
        line = path.read_bytes().split(b"\n", 1)[0]
    except FileNotFoundError:
        return None
    checksum, _, body = line.partition(b" ")
    if f"{zlib.crc32(body):08x}".encode() != checksum:
        return None
    state: dict[str, Any] = json.loads(body)
    return state


def process_start_ns() -> int:
    """Return when this process began, on the clock of ``time.monotonic_ns``.

    Linux tells, so that the interpreter's start and every import count; elsewhere it is the import of this module.
    """
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return _IMPORTED
    return time.monotonic_ns() - max(0, round(age * 1e9))
