"""When the allocation that a process runs in began: devices are paid for from then on. Standard library only."""

from __future__ import annotations

import datetime
import os
import time
from pathlib import Path

from ds_lightning.cost.records import iter_ledger

START = "SLURM_JOB_START_TIME"
"""Where Slurm tells when the job began, in seconds since 1970 (sbatch, "OUTPUT ENVIRONMENT VARIABLES")."""


def unbooked_allocation_ns(ledger: Path) -> int | None:
    """Return when the Slurm allocation began, on the clock of ``time.monotonic_ns``, if nobody has booked it.

    Args:
        ledger: The run's ledger. A record from within the allocation is one of an attempt that has booked its start.

    Returns:
        None: an earlier attempt has booked it.

    Raises:
        ValueError: If the environment does not tell, or the ledger was tampered with.
    """
    told, now = os.environ.get(START, ""), time.time()
    if not told.isdecimal() or int(told) > now:
        raise ValueError(
            f"cost.from_allocation is true and {START} is {told!r}, expected the start of a Slurm job, in seconds "
            "since 1970"
        )
    if ledger.is_file():
        for record in iter_ledger(ledger):
            if datetime.datetime.fromisoformat(record["time"]).timestamp() >= int(told):
                return None
    return time.monotonic_ns() - round((now - int(told)) * 1e9)
