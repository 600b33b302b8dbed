"""Runs of the toy of ``toy_pretraining`` on some ranks, in this process and those beside it."""

import json
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from ds_lightning.training import PretrainModule, ZeRO
from tests.training.toy_pretraining import CONFIG, Rows, draw_step, split

STEPS = 6


class Curves(Callback):
    """Keeps what was logged at every optimizer step."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []
        self._step = 0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self.points.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def settings(**changes: Any) -> dict[str, Any]:
    """Return what a run is made of: ``stage`` 0 is DDP, none is one process."""
    return {"stage": None, "accumulate": 1, "module": {"lr": 1e-2, "eps": 1e-3}, "clip": 0.5, **changes}


def train(run: dict[str, Any]) -> dict[str, Any]:
    """Train, and return the curves and the final weights in full."""
    torch.manual_seed(0)
    stage, accumulate = run["stage"], run["accumulate"]
    strategy: Any = {None: "auto", 0: "ddp"}.get(stage) or ZeRO(stage)
    module, curves = PretrainModule(CONFIG, 10_000, **run["module"]), Curves()
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if stage is None else 2,
        strategy=strategy,
        max_epochs=1,
        precision="32-true",
        callbacks=[curves],
        accumulate_grad_batches=accumulate,
        gradient_clip_val=run["clip"],
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    ranks, rank = trainer.world_size, trainer.global_rank
    parts = [split(draw_step(seed), ranks * accumulate) for seed in range(STEPS)]
    trainer.fit(module, Rows([step[micro * ranks + rank] for step in parts for micro in range(accumulate)]))
    weights = {}
    for name, parameter in module.named_parameters():
        if isinstance(strategy, ZeRO):
            with strategy.whole([parameter]):
                weights[name] = parameter.detach().clone()
        else:
            weights[name] = parameter.detach().clone()
    return {"points": curves.points, "weights": weights, "buffers": dict(module.named_buffers())}


def main(runs: str) -> list[dict[str, Any]]:
    """Train runs one after the other."""
    return [train(run) for run in json.loads(runs)]
