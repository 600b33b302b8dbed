"""How a run that cannot go on ends on all ranks."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer

from ds_lightning.user_errors import RunFailedError

_PATIENCE_SECONDS = 15.0


def fail_together(trainer: Trainer, message: str, kind: type[Exception] = RunFailedError) -> NoReturn:
    """End the run on every rank; all of them must call it at the same point.

    Args:
        trainer: Of the run.
        message: One line, which rank 0 says.
        kind: Of the error; it decides the status with which the run ends.

    Raises:
        Exception: Of that kind, on rank 0.
        SystemExit: On the others, with status 1.
    """
    if trainer.is_global_zero:
        raise kind(message)
    wait_for_launcher(trainer)
    raise SystemExit(1)


@contextmanager
def refused_once(trainer: Trainer) -> Iterator[None]:
    """Leave it to rank 0 to say what every rank refuses, such as a batch that the ranks cannot share.

    Args:
        trainer: Of the run.

    Raises:
        ValueError: What was raised meanwhile, unless rank 0 has ended too.
        SystemExit: With status 2, if it has.
    """
    try:
        yield
    except ValueError:
        if wait_for_launcher(trainer):
            raise SystemExit(2) from None
        raise


def wait_for_launcher(trainer: Trainer, seconds: float = _PATIENCE_SECONDS) -> bool:
    """Let rank 0 end first where it has started this process, and tell whether it has.

    Lightning's launcher kills it, maybe before its last words, when it sees another rank fail first.
    """
    if not started_by_lightning(trainer):
        return False
    parent, deadline = os.getppid(), time.monotonic() + seconds
    while os.getppid() == parent and time.monotonic() < deadline:
        time.sleep(0.05)
    return os.getppid() != parent


def started_by_lightning(trainer: Trainer) -> bool:
    """Tell whether rank 0 has started this process, by Lightning's launcher, and watches how it ends."""
    environment = trainer._accelerator_connector.cluster_environment
    return isinstance(environment, LightningEnvironment) and environment.local_rank() > 0
