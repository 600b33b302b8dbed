"""A callback that tells, while a run is on its way, where each of its ranks stands: for whoever wants to kill it there.

Line by line in ``MOMENTS``, a file for each rank: the process, the time on the clock of the machine, what it begins
and after how many optimizer steps. In the environment, so that config and command of all attempts are the same.
"""

import os
import time
from pathlib import Path
from typing import IO, Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

PHASES = ("training", "validating", "saving", "exporting")


class Moment(NamedTuple):
    """What a rank began, and when."""

    pid: int
    seconds: float
    phase: str
    step: int


class Moments(Callback):
    """Tell it.

    Args:
        pause: Seconds to sleep before the start, so that the beats of a short attempt's ledger are less than 1% of it.
    """

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause
        self.file: IO[str] | None = None
        self.doing = self.before = "starting"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin the file."""
        if stage == "fit" and "MOMENTS" in os.environ:
            self.file = file_of(Path(os.environ["MOMENTS"]), trainer.global_rank).open("w", encoding="ascii")
            self.tell(self.doing, trainer)
        if stage == "fit":
            time.sleep(self.pause)

    def tell(self, phase: str, trainer: Trainer) -> None:
        """Add a line."""
        self.doing = phase
        if self.file is not None:
            print(os.getpid(), time.monotonic(), phase, trainer.global_step, file=self.file, flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The wait for the first batch."""
        self.tell("training", trainer)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """A micro-batch."""
        self.tell("training", trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation."""
        self.before = self.doing
        self.tell("validating", trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What a validation interrupted."""
        self.tell(self.before, trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A save, up to the next line."""
        self.tell("saving", trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The export, which follows a fit."""
        if stage == "fit":
            self.tell("exporting", trainer)


def file_of(path: Path, rank: int) -> Path:
    """Return the file of a rank."""
    return path.with_name(f"{path.name}-{rank}")


def read_moments(path: Path, rank: int) -> list[Moment]:
    """Return what a rank has told so far; the line that it is about to write is left out."""
    try:
        whole, _, _ = file_of(path, rank).read_text(encoding="ascii").rpartition("\n")
    except FileNotFoundError:
        return []
    rows = [line.split() for line in whole.splitlines()]
    return [Moment(int(pid), float(seconds), phase, int(step)) for pid, seconds, phase, step in rows]
