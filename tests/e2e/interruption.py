"""A callback that interrupts its own process at an exact point, as the environment says; else it does nothing.

``INTERRUPT`` is ``SIGNAL PLACE NUMBER``: ``SIGKILL micro_batch 13`` in the 14th micro-batch before its backward pass,
``SIGTERM validation 8`` between two batches of the validation after 8 optimizer steps, ``SIGKILL save 9`` in the save
of step 9 with half of its state on disk, ``SIGKILL saved 9`` as soon as that checkpoint is complete. ``SLEEP`` makes
the first micro-batch, or the first after as many as ``SLEEP_AT`` says, last that many seconds longer. In the
environment, so that the config and the command of all attempts are the same. ``INTERRUPT_RANK``
is the rank that it happens on; none: all. The moment of the signal, on the clock of the machine, is the text of the
file ``INTERRUPTED_AT``.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ds_lightning.training import checkpoint


class Interruption(Callback):
    """Send the signal at the place."""

    def __init__(self) -> None:
        name, self.place, number = os.environ.get("INTERRUPT", "SIGTERM nowhere 0").split()
        self.signal, self.number = signal.Signals[name], int(number)
        self.sleep, self.sleep_at = float(os.environ.get("SLEEP", "0")), int(os.environ.get("SLEEP_AT", "0"))

    def interrupt(self) -> None:
        """Note the time, and send the signal."""
        if "INTERRUPTED_AT" in os.environ:
            Path(os.environ["INTERRUPTED_AT"]).write_text(repr(time.monotonic()), encoding="ascii")
        os.kill(os.getpid(), self.signal)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the interruption into the save."""
        if os.environ.get("INTERRUPT_RANK", str(trainer.global_rank)) != str(trainer.global_rank):
            self.place = "nowhere"
        publish = checkpoint.publish

        def interrupted(temporary: Path, **facts: Any) -> Path:
            state = temporary / checkpoint.STATE
            if self.place == "save" and temporary.name == f"step-{self.number:08d}.tmp":
                if self.signal == signal.SIGKILL:
                    file = next(state.rglob("*.pt")) if state.is_dir() else state
                    os.truncate(file, file.stat().st_size // 2)
                self.interrupt()
            path = publish(temporary, **facts)
            if self.place == "saved" and path.name == f"step-{self.number:08d}":
                self.interrupt()
            return path

        if self.place in ("save", "saved"):
            checkpoint.publish = interrupted

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        """Make a micro-batch last longer, and interrupt one."""
        if trainer.fit_loop.epoch_loop.batch_idx >= self.sleep_at:
            time.sleep(self.sleep)
            self.sleep = 0.0
        if self.place == "micro_batch" and trainer.fit_loop.epoch_loop.batch_idx == self.number:
            self.interrupt()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Interrupt a validation."""
        if self.place == "validation" and trainer.global_step == self.number:
            self.place = "nowhere"  # once, not after every batch
            self.interrupt()
