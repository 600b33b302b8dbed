"""Saves, stops and faults of the toy of ``toy_zero``, in one of two ranks."""

import os
import resource
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from ds_lightning.callbacks import Checkpoints, Preemption, ReplicaCheck, RoutingBias
from ds_lightning.training import checkpoint
from tests.training.toy_zero import Curves, Toy, rows_of, settings, trainer_of, whole_weights

NAMES = [f"{stage} {optimizer}" for stage in (1, 2, 3) for optimizer in ("adamw", "muon")]
"""Of the runs that are stopped and go on: stage and optimizer."""


class Noisy(Toy):
    """Its loss depends on the random state of the rank."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + 0.1 * torch.rand(()))


class On(Callback):
    """Does something before a micro-batch, on one rank."""

    def __init__(self, rank: int, micro_batch: int, action: Any) -> None:
        self.rank, self.micro_batch, self.action = rank, micro_batch, action

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.global_rank, batch_idx) == (self.rank, self.micro_batch):
            self.action()


def attempt(
    folder: Path, stage: int, *callbacks: Callback, seed: int, every: int = 2, optimizer: str = "adamw"
) -> dict[str, Any]:
    """Fit, from the newest valid checkpoint in the folder if there is one; two micro-batches a step."""
    run = settings(stage=stage, accumulate=2, module={"lr": 1e-2, "eps": 1e-3, "optimizer": optimizer})
    module, curves, saves = Noisy(None, **run["module"]), Curves(), Checkpoints(every_n_steps=every, keep_last=9)
    options = {"default_root_dir": folder, "enable_checkpointing": True}
    trainer = trainer_of(run, RoutingBias(), curves, *callbacks, saves, **options)
    newest, skipped = checkpoint.newest_valid(folder / "checkpoints")
    first = 0 if newest is None else checkpoint.verify(newest).step
    torch.manual_seed(seed + trainer.global_rank)
    error = ""
    try:
        rows = rows_of(run, trainer, first)
        trainer.fit(module, rows, ckpt_path=None if newest is None else newest / checkpoint.STATE)
    except (OSError, RuntimeError, SystemExit) as raised:
        error = f"{type(raised).__name__}: {raised}"
    trainer.strategy.barrier()
    return {
        "first": first,
        "points": curves.points,
        "biases": curves.biases,
        "weights": {} if error else whole_weights(trainer, module),
        "failed_saves": saves.failed_saves,
        "saved": sorted(path.name for path in (folder / "checkpoints").iterdir()),
        "stopped": saves.stopped,
        "skipped": [str(skip) for skip in skipped],
        "error": error,
    }


def resume(folder: str) -> dict[str, list[dict[str, Any]]]:
    """Run straight, and stopped by a signal to rank 1 in the third step, then on with another seed."""
    results = {}
    for name in NAMES:
        stage, optimizer = name.split()
        at = Path(folder) / name
        kill = On(1, 4, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        straight = attempt(at / "straight", int(stage), seed=10, optimizer=optimizer)
        stopped = attempt(at / "parts", int(stage), kill, Preemption(), seed=10, optimizer=optimizer)
        resumed = attempt(at / "parts", int(stage), seed=20, optimizer=optimizer)
        results[name] = [straight, stopped, resumed]
    return results


def full_disk(folder: str) -> list[dict[str, Any]]:
    """Let the disk of rank 1 be full in the save of step 2, then in the last one."""

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    full, free = On(1, 2, lambda: limit(40_000)), On(1, 4, lambda: limit(resource.RLIM_INFINITY))
    passing = attempt(Path(folder) / "passing", 2, full, free, seed=10)
    lasting = attempt(Path(folder) / "lasting", 2, On(1, 10, lambda: limit(40_000)), seed=10)
    limit(resource.RLIM_INFINITY)
    return [passing, lasting]


def flipped(folder: str) -> dict[str, Any]:
    """Turn the lowest bit of one weight of rank 1 in the third step, and compare after every step."""

    class Flip(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if (trainer.global_rank, batch_idx) == (1, 5):
                pl_module.model.lm_head.weight.data.view(torch.int32)[3, 4] ^= 1

    return attempt(Path(folder) / "flipped", 2, Flip(), ReplicaCheck(every_n_steps=1), seed=10)


def faults(folder: str) -> dict[str, Any]:
    """Everything that goes wrong."""
    return {"full disk": full_disk(folder), "flipped": flipped(folder)}


def main(folder: str) -> dict[str, Any]:
    """All of it."""
    return {"resume": resume(folder), **faults(folder)}
