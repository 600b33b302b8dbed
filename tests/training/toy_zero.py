"""Runs of the toy of ``toy_pretraining`` on some ranks: in this process, or in one of the ranks of ``ranks.py``."""

import json
import os
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from ds_lightning.callbacks import RoutingBias
from ds_lightning.training import PretrainModule, ZeRO
from tests.training.toy_pretraining import CONFIG, ROWS, Batch, Rows, draw_step, split

STEPS = 6


def settings(**changes: Any) -> dict[str, Any]:
    """Return what a run is made of.

    ``stage`` none is one process, ``starve`` gives most experts no token of the second half of the rows, ``nan_at`` is
    a step whose loss is not a number on the last rank.
    """
    run = {"stage": None, "accumulate": 1, "module": {"lr": 1e-2, "eps": 1e-3}, "clip": 0.5, "precision": "32-true"}
    return {**run, "starve": False, "nan_at": None, "offload": False, "seed": 0, **changes}


class Toy(PretrainModule):
    """Breaks one step, and keeps what the experts of this rank had to do."""

    def __init__(self, nan_at: int | None, **options: Any) -> None:
        super().__init__(CONFIG, 10_000, **options)
        self.nan_at = nan_at
        self.loads: list[Tensor] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        assert self.expert_load is not None
        self.loads.append(self.expert_load.clone())
        broken = self.trainer.global_step == self.nan_at and self.trainer.global_rank == self.trainer.world_size - 1
        return loss * float("nan") if broken else loss


class Curves(Callback):
    """Keeps what was logged at every optimizer step, and the routing biases after it."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []
        self.biases: list[dict[str, Tensor]] = []
        self._step = 0

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self.points.append({name: float(value) for name, value in trainer.callback_metrics.items()})
            self.biases.append({name: buffer.clone() for name, buffer in pl_module.named_buffers()})


def steps(*, starve: bool = False) -> list[Batch]:
    """Return the global batches of a run."""
    drawn = [draw_step(seed) for seed in range(STEPS)]
    for step in drawn if starve else ():
        step["input_ids"][ROWS // 2 :] = 5
    return drawn


def trainer_of(run: dict[str, Any], *callbacks: Callback, **options: Any) -> Trainer:
    """Return a silent trainer."""
    one = run["stage"] is None
    strategy: Any = "auto" if one else ZeRO(run["stage"], offload_optimizer=run["offload"])
    return Trainer(
        accelerator="cpu",
        devices=1 if one else int(os.environ.get("WORLD_SIZE", "2")),
        strategy=strategy,
        max_epochs=1,
        callbacks=list(callbacks),
        accumulate_grad_batches=run["accumulate"],
        gradient_clip_val=run["clip"],
        **{
            "precision": run["precision"],
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            **options,
        },
    )


class From:
    """Micro-batches from some index on; the length counts from zero, since Lightning counts on from the checkpoint."""

    def __init__(self, rows: list[Batch], first: int) -> None:
        self.rows, self.first = rows, first

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Batch]:
        yield from self.rows[self.first :]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class RowsFrom(Rows):
    first = 0

    def train_dataloader(self) -> Any:
        return From(self.train, self.first)


def rows_of(run: dict[str, Any], trainer: Trainer, first_step: int = 0) -> RowsFrom:
    """Return this rank's micro-batches."""
    ranks, accumulate = trainer.world_size, run["accumulate"]
    parts = [split(step, ranks * accumulate) for step in steps(starve=run["starve"])]
    rows = RowsFrom([step[micro * ranks + trainer.global_rank] for step in parts for micro in range(accumulate)])
    rows.first = first_step * accumulate
    return rows


def whole_weights(trainer: Trainer, module: Any) -> dict[str, Tensor]:
    """Return all weights in full."""
    weights = {}
    for name, parameter in module.named_parameters():
        if isinstance(trainer.strategy, ZeRO):
            with trainer.strategy.whole([parameter]):
                weights[name] = parameter.detach().float().clone()
        else:
            weights[name] = parameter.detach().clone()
    return weights


def train(run: dict[str, Any]) -> dict[str, Any]:
    """Train, and return the curves, the final weights in full, and what the experts had to do."""
    torch.manual_seed(run["seed"])
    module, curves = Toy(run["nan_at"], **run["module"]), Curves()
    trainer = trainer_of(run, RoutingBias(), curves)
    trainer.fit(module, rows_of(run, trainer))
    return {
        "points": curves.points,
        "biases": curves.biases,
        "weights": whole_weights(trainer, module),
        "loads": module.loads,
        "tokens": module.tokens_seen,
        "rope": module.model.rope_tables(12, torch.device("cpu")) if module.model else None,
    }


def main(runs: str) -> list[dict[str, Any]]:
    """Train runs one after the other."""
    return [train(run) for run in json.loads(runs)]
