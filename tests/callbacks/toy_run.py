"""A toy run with everything that a resume can get wrong, and ways to interrupt it.

Dropout and three random generators, a fused optimizer, a schedule, a buffer that counts micro-batches, a datamodule
that starts where ``tokens_seen`` says, validation in the middle of the epoch, and a logger that keeps every point.
"""

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ds_lightning.callbacks.checkpoints import Checkpoints
from ds_lightning.training import checkpoint

NUM_STEPS = 12
ROW_TOKENS = 8


Losses = dict[tuple[int, int], float]  # by optimizer steps completed and index of the micro-batch
Action = Callable[[Trainer], None]


class Toy(LightningModule):
    """A classifier with dropout, noise from three generators, and a buffer that counts micro-batches."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(ROW_TOKENS, 16), nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, 1))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.tokens_seen = 0
        self.losses: Losses = {}
        self.validated: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.count += 1
        x = batch + 0.1 * random.random() + 0.1 * float(np.random.rand())
        loss: Tensor = (self.net(x) - x.sum(dim=1, keepdim=True)).square().mean()
        self.losses[self.trainer.global_step, batch_idx] = loss.item()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 0:
            self.validated.append(self.trainer.global_step)
        self.log("val/loss", self.net(batch).square().mean())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.tokens_seen += self.trainer.accumulate_grad_batches * 2 * ROW_TOKENS

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Rows(IterableDataset[Tensor]):
    """Micro-batches from ``first`` on; the length counts from zero."""

    def __init__(self, first: int, total: int) -> None:
        self.first, self.total = first, total

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(self.first, self.total):
            yield torch.randn(2, ROW_TOKENS, generator=torch.Generator().manual_seed(index))

    def __len__(self) -> int:
        return self.total


class Data(LightningDataModule):
    def __init__(self, micro_batches: int) -> None:
        super().__init__()
        self.micro_batches = micro_batches
        self.first = 0

    @property
    def toy(self) -> Toy:
        assert self.trainer is not None
        assert isinstance(self.trainer.lightning_module, Toy)
        return self.trainer.lightning_module

    def state_dict(self) -> dict[str, Any]:
        return {"tokens_seen": self.toy.tokens_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.toy.tokens_seen = state_dict["tokens_seen"]
        self.first = state_dict["tokens_seen"] // (2 * ROW_TOKENS)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Rows(self.first, self.micro_batches), batch_size=None)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Rows(1000, 1003), batch_size=None)


class Points(Logger):
    """Every point that TensorBoard would get."""

    name, version = "points", 0

    def __init__(self) -> None:
        super().__init__()
        self.points: list[tuple[str, int | None, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.points += [(name, step, value) for name, value in metrics.items() if name != "epoch"]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class StepCounter(Callback):
    """Stands for callbacks which act on optimizer steps, such as the routing bias; listed after Checkpoints."""

    def __init__(self) -> None:
        self.step = 0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.step = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]


class Killed(BaseException):
    """Ends a run in this process as SIGKILL would: nothing is written any more."""


class At(Callback):
    """Do something in the training step of one micro-batch (before its backward), or in a validation.

    Args:
        action: Called with the trainer; its result is ignored.
        micro_batch: Index of the micro-batch, from zero.
        validation: Optimizer steps completed at the validation.
    """

    def __init__(self, action: Action, micro_batch: int | None = None, validation: int | None = None) -> None:
        self.action, self.micro_batch, self.validation = action, micro_batch, validation

    def on_before_backward(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx == self.micro_batch:
            self.action(trainer)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.global_step == self.validation and batch_idx == 1:
            self.action(trainer)


def kill(trainer: Trainer) -> None:
    raise Killed


def stop(trainer: Trainer) -> None:
    assert isinstance(trainer.checkpoint_callback, Checkpoints)
    trainer.checkpoint_callback.save_and_stop()


def send(number: signal.Signals) -> Action:
    return lambda trainer: os.kill(os.getpid(), number)


class Run:
    """One attempt: fit the toy, from the newest valid checkpoint in ``folder`` if ``resume``."""

    def __init__(
        self,
        folder: Path,
        *callbacks: Callback,
        accumulate: int = 1,
        resume: bool = False,
        checkpoints: Checkpoints | None = None,
        validate_every: int | None = None,
        seed: int = 0,
        min_steps: int | None = None,
        plugins: list[Any] | None = None,
    ) -> None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.module, self.logger = Toy(), Points()
        self.checkpoints = checkpoints or Checkpoints(every_n_steps=3)
        self.folder = folder / "checkpoints"
        self.trainer = Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            max_steps=NUM_STEPS,
            accumulate_grad_batches=accumulate,
            val_check_interval=validate_every or 4 * accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=1,
            log_every_n_steps=2,
            logger=self.logger,
            callbacks=[self.checkpoints, StepCounter(), *callbacks],
            enable_progress_bar=False,
            enable_model_summary=False,
            min_steps=min_steps,
            plugins=plugins,
        )
        self.started_from = checkpoint.newest_valid(self.folder)[0] if resume else None
        assert bool(self.started_from) == resume
        self.killed = False
        path = self.started_from and self.started_from / checkpoint.STATE
        try:
            self.trainer.fit(self.module, Data(NUM_STEPS * accumulate), ckpt_path=path)
        except Killed:
            self.killed = True

    @property
    def losses(self) -> Losses:
        return self.module.losses

    @property
    def points(self) -> list[tuple[str, int | None, float]]:
        return self.logger.points

    @property
    def validated(self) -> list[int]:
        return self.module.validated

    @property
    def saved_steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.iterdir())

    @property
    def newest(self) -> Path:
        newest, skipped = checkpoint.newest_valid(self.folder)
        assert newest is not None
        assert skipped == []
        return newest

    @property
    def start(self) -> int:
        """Step of the checkpoint from which this attempt started."""
        assert self.started_from is not None
        return int(self.started_from.name.removeprefix("step-"))

    def final_state(self) -> dict[str, Any]:
        """Return what is in the newest checkpoint, the random state of this process included."""
        random_state = torch.load(self.newest / checkpoint.rank_file(0))
        return {**torch.load(self.newest / checkpoint.STATE), "random": random_state}


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested states differ, bitwise."""
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    if isinstance(a, dict):
        keys = sorted(a.keys() | b.keys(), key=str)
        return [d for key in keys for d in differences(a.get(key), b.get(key), f"{path}/{key}")]
    if isinstance(a, list | tuple):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for index, (x, y) in pairs for d in differences(x, y, f"{path}/{index}")]
    return [] if a == b else [path]


def departures(straight: Run, first: Run, second: Run) -> dict[str, Any]:
    """How ``first``, interrupted, and ``second``, resumed from it, depart from the straight run; nothing if bitwise."""
    checks: dict[str, tuple[Any, Any]] = {
        "steps": (second.trainer.global_step, straight.trainer.global_step),
        "weights": (differences(straight.module.state_dict(), second.module.state_dict()), []),
        "checkpoint": (differences(straight.final_state(), second.final_state()), []),
        "losses": ({**first.losses, **second.losses}, straight.losses),
        "redone": (second.losses, {key: loss for key, loss in straight.losses.items() if key[0] >= second.start}),
        "validated": (sorted({*first.validated, *second.validated}), straight.validated),
        "validated twice": (len(second.validated), len(set(second.validated))),
        "points": (sorted({*first.points, *second.points}), sorted(straight.points)),
        "points twice": (len(second.points), len(set(second.points))),
    }
    return {name: pair for name, pair in checks.items() if pair[0] != pair[1]}
