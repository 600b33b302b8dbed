"""What a run does when it is told to go: checkpoint at the next optimizer step, then stop."""

import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ds_lightning.callbacks.checkpoints import Checkpoints


class Preemption(Callback):
    """Ends training at the next optimizer step when a signal comes, with a checkpoint of that step.

    The handlers do nothing but set a flag: what a checkpoint needs (collectives, allocations, files) is not safe
    in the middle of whatever the signal interrupted. All ranks agree at each optimizer step, so it does not matter
    which of them was told.

    How long it takes: a signal during training waits for the rest of the optimizer step and the save; a validation
    due at that step is left to the resumed run. A signal during a validation waits for its end, because half a
    validation is worth nothing; keep ``limit_val_batches`` below the notice that the scheduler gives.

    A second SIGINT raises KeyboardInterrupt at once.

    From the sanity check on the handlers replace Lightning's own, whose SIGTERM handler ends the run without a
    checkpoint, and talks to other ranks in the middle of whatever they do. Before every micro-batch Lightning asks rank
    0 whether that handler was called, which makes the host wait for the device; that is left out too. Lightning puts
    back the handlers from before the run at its end.

    Attributes:
        preempted: Whether training was ended before its last step, with a valid checkpoint.

    Args:
        signals: Names of the signals to act on.

    Raises:
        ValueError: If a name is no signal, or one that no process can handle; in ``setup``, if the trainer has no
            ``Checkpoints`` callback.
    """

    def __init__(self, signals: Sequence[str] = ("SIGTERM", "SIGUSR1", "SIGINT")) -> None:
        known = signal.Signals.__members__
        for name in signals:
            if name not in known or name in ("SIGKILL", "SIGSTOP"):
                raise ValueError(
                    f"Preemption: signals has {name!r}, expected names of signals such as SIGTERM, SIGUSR1"
                )
        self.signals = tuple(known[name] for name in signals)
        self.preempted = False
        self._received: set[int] = set()
        self._asked = False
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is something to save with, and forget an earlier run of the same callback."""
        if stage == "fit":
            self._checkpoints(trainer)
            self.preempted = self._asked = False
            self._received.clear()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers: a signal in the sanity check ends the run after its first step."""
        self._install(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers, where there was no sanity check."""
        self._step = trainer.global_step
        self._install(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ask for the stop before ``Checkpoints``, which comes last, looks for it at the same optimizer step."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._ask(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask for the stop after a validation, if the signal came during it."""
        if not trainer.sanity_checking:
            self._ask(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell whether training was ended early."""
        self.preempted = self._asked and self._checkpoints(trainer).stopped

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say why the run ends, where Lightning would end the process without a word."""
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            print("interrupted: the same command goes on from the newest checkpoint", file=sys.stderr, flush=True)

    def _install(self, trainer: Trainer) -> None:
        for number in self.signals:
            signal.signal(number, self._handle)
        if signal.SIGTERM in self.signals:
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _say_nothing  # type: ignore[method-assign]

    def _ask(self, trainer: Trainer) -> None:
        if trainer.strategy.reduce_boolean_decision(bool(self._received), all=False):
            self._asked = True
            self._checkpoints(trainer).save_and_stop()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self._received:
            raise KeyboardInterrupt
        self._received.add(number)

    @staticmethod
    def _checkpoints(trainer: Any) -> Checkpoints:
        for callback in trainer.callbacks:
            if isinstance(callback, Checkpoints):
                return callback
        raise ValueError("Preemption: trainer.callbacks has no Checkpoints, expected one: add it, or remove Preemption")


def _say_nothing() -> None:
    """Stand in for Lightning's question to rank 0."""
