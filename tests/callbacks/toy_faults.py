"""Runs of the toy of ``toy_zero`` that break at some steps: in this process, or in one of the ranks of ``ranks.py``."""

import json
import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from ds_lightning.callbacks import ExpertLoad, ReplicaCheck, RoutingBias, SkipSteps, Watchdog
from ds_lightning.optim import Stairs
from ds_lightning.training import PretrainModule
from ds_lightning.user_errors import RunFailedError
from tests.training.toy_pretraining import CONFIG
from tests.training.toy_zero import Curves, rows_of, settings, trainer_of, whole_weights


class Broken(PretrainModule):
    """Multiplies the loss of some steps, on the last rank alone, by a factor."""

    def __init__(self, factors: dict[str, float], **options: Any) -> None:
        super().__init__(CONFIG, 10_000, lr_schedule=Stairs([1.0], []), **options)
        self.factors = factors

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        last = self.trainer.global_rank == self.trainer.world_size - 1
        return loss * (self.factors.get(str(self.trainer.global_step), 1.0) if last else 1.0)


def start(run: dict[str, Any], *callbacks: Callback, **options: Any) -> Trainer:
    """Return a silent trainer; stage 0 is plain data parallelism."""
    if run["stage"] != 0:
        return trainer_of(run, *callbacks, **options)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=1,
        callbacks=list(callbacks),
        gradient_clip_val=run["clip"],
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **{**quiet, **options},
    )


def train(run: dict[str, Any], *more: Callback, leave_out: int | None = None) -> dict[str, Any]:
    """Train, with or without a step, and return what a skip must not touch."""
    torch.manual_seed(0)
    module, curves, load = Broken(run["factors"], **run["module"]), Curves(), ExpertLoad(window=3)
    trainer = start(run, SkipSteps(**run["skip"]), RoutingBias(), load, curves, *more)
    rows = rows_of(run, trainer)
    if leave_out is not None:
        first = leave_out * run["accumulate"]
        del rows.train[first : first + run["accumulate"]]
    error = ""
    try:
        trainer.fit(module, rows)
    except RunFailedError as failed:
        error = str(failed)
    except SystemExit as ended:
        error = f"status {ended.code}"
    return {
        "error": error,
        "points": curves.points,
        "weights": whole_weights(trainer, module),
        "biases": curves.biases[-1],
        "optimizer": trainer.optimizers[0].state_dict()["state"] if run["stage"] is None else None,
        "load": [module.last_expert_load, load.state_dict()],
        "tokens": module.tokens_seen,
        "skipped": int(module.skipped_steps),
    }


def breaking(factors: dict[int, float], skip: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Return the settings of a run whose losses are multiplied."""
    return {
        **settings(**changes),
        "factors": {str(step): factor for step, factor in factors.items()},
        "skip": skip or {},
    }


class Hanging(Broken):
    """Sleeps in its third step, on rank 1."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if (self.trainer.global_rank, batch_idx) == (1, 2):
            time.sleep(300)
        return super().training_step(batch, batch_idx)


def hang(folder: str, stage: str) -> None:
    """Train until the watchdog ends it."""
    run = breaking({}, stage=int(stage))
    module = Hanging({}, **run["module"])
    trainer = start(run, Watchdog(timeout=30.0), default_root_dir=folder)
    trainer.fit(module, rows_of(run, trainer))


class Flip(Callback):
    """Flips the lowest bit of one weight, or of a routing bias, on rank 1 before some step."""

    def __init__(self, step: int, name: str) -> None:
        self.step, self.name = step, name

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if (trainer.global_rank, trainer.global_step) == (1, self.step):
            tensor = pl_module.get_parameter(self.name) if "weight" in self.name else pl_module.get_buffer(self.name)
            bits = tensor.detach().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)
            bits.view(-1)[3] ^= 1


def flip(runs: str) -> list[list[Any]]:
    """Train runs one after the other, each with a flipped bit, and return what was said and the steps made."""
    results = []
    for run, step, name in json.loads(runs):
        made = Curves()
        error = train(run, Flip(step, name), ReplicaCheck(every_n_steps=2), made)["error"]
        results.append([error, len(made.points)])
    return results


def main(runs: str) -> list[dict[str, Any]]:
    """Train runs one after the other."""
    return [train(run) for run in json.loads(runs)]
