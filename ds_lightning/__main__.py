"""``python -m ds_lightning`` is ``ds-lightning``."""

import atexit
import os
import sys

_status: int | None = None


def run() -> None:
    """Run the command and end the process with its status."""
    global _status
    from ds_lightning.cli import main

    try:
        _status = main()
    except SystemExit as end:  # Lightning's, after an interrupt
        _status = end.code if isinstance(end.code, int) else None
        raise
    sys.exit(_status)


def _leave() -> None:
    """Spare the interpreter's last collection of garbage: seconds with torch, which no ledger can book any more."""
    if _status is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status)


atexit.register(_leave)  # what registers later runs before it, the ledger and torch too

if __name__ == "__main__":
    run()
