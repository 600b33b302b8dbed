"""Signals to one of two ranks, and writes refused to one of them, under ZeRO in the toy of ``toy_line``."""

import builtins
import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ds_lightning.callbacks import Preemption
from tests.training.toy_line import Result, attempt, draw

PLACES = {"backward": 3, "validation": 2, "save": 2}
"""Where a signal comes, and the step that the run ends with."""
TOLD = ((0, signal.SIGUSR1), (1, signal.SIGTERM))
SETTINGS: dict[str, Any] = {"ranks": 2, "accumulate_grad_batches": 2, "val_check_interval": 4, "val": [draw(9)] * 2}
"""A validation after two of four steps."""


class Tell(Callback):
    """Sends a signal to one rank: in the first backward pass of step 3, in a validation, or in the save of step 1."""

    def __init__(self, rank: int, place: str, number: signal.Signals) -> None:
        self.rank, self.place, self.number = rank, place, number

    def tell(self, trainer: Trainer, place: str) -> None:
        if (trainer.global_rank, self.place) == (self.rank, place):
            self.place = "nowhere"
            os.kill(os.getpid(), self.number)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if trainer.global_step == 2:
            loss.register_hook(lambda gradient: self.tell(trainer, "backward"))

    def on_validation_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.tell(trainer, "validation")

    def on_save_checkpoint(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 1:
            self.tell(trainer, "save")


class Refuse(Callback):
    """Lets rank 1 open no file to write to, from the start of one step to that of another."""

    def __init__(self, first: int, end: int) -> None:
        self.first, self.end = first, end
        self._open = builtins.open

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        refused = trainer.global_rank == 1 and self.first <= trainer.global_step < self.end
        builtins.open = self._refuse if refused else self._open

    def on_exception(self, *args: Any) -> None:
        builtins.open = self._open

    def _refuse(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" in mode:
            raise PermissionError(13, "Permission denied", str(file))
        return self._open(file, mode, *args, **kwargs)


def stopped(folder: Path) -> dict[str, list[Any]]:
    """Return, by rank told and place, whether the run ended early, what it made, and what went on from there."""
    made: dict[str, list[Any]] = {}
    for rank, number in TOLD:
        for place in PLACES:
            at, preemption = folder / f"{rank} {place}", Preemption()
            first = attempt("ours", at, Tell(rank, place, number), preemption, seed=10, **SETTINGS)
            second = attempt("ours", at, Preemption(), seed=20, resume=True, **SETTINGS)
            made[f"{rank} {place}"] = [preemption.preempted, first, second]
    return made


def refused(folder: Path, first: int, end: int) -> tuple[Result, list[str]]:
    """Return what a run made of a disk that one rank may not write to for some steps, and the checkpoints it left.

    After an error rank 0 alone knows: it removes what was not finished when the others may be gone.
    """
    result = attempt("ours", folder, Refuse(first, end), seed=10, **SETTINGS)
    return result, sorted(path.name for path in (folder / "checkpoints").iterdir())


def main(folder: str) -> dict[str, Any]:
    """All of it."""
    at = Path(folder)
    return {
        "straight": attempt("ours", at / "straight", Preemption(), seed=10, **SETTINGS),
        "stopped": stopped(at),
        "refused for a step": refused(at / "for a step", 1, 2),
        "refused at the end": refused(at / "at the end", 3, 9),
    }
