#!/usr/bin/env python3
"""Train the model of the quickstart on random tokens and write when its steps end, for scripts/reliability_cost.

Alone it saves at fixed steps. As one of several ranks it saves nothing: of every four optimizer steps one has the
agreement of ranks (was one told to stop, is a save due), one the filter of SkipSteps, and two have neither.
"""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from ds_lightning.callbacks import Checkpoints, CostLedger, Preemption, RoutingBias, SkipSteps, Watchdog
from ds_lightning.config import DeepSeekConfig
from ds_lightning.cost.run_config import read_sections
from ds_lightning.optim import WarmupStableDecay
from ds_lightning.training import PretrainModule

CONFIG = Path(__file__).resolve().parent.parent / "configs/pretrain/quickstart.yaml"
VARIANTS = ("neither", "agreement", "neither again", "filter")
CALLS = 200


def variant(step: int) -> str:
    """Return what an optimizer step has, by its index; the order in a cycle changes, or logging would favour one."""
    return VARIANTS[(step + step // len(VARIANTS)) % len(VARIANTS)]


class Stopwatch(Checkpoints):
    """Comes after all other callbacks, and notes when an optimizer step ends and how long its own part of it took."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.ends: list[float] = []
        self.seconds: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """Save if it is time."""
        started = time.perf_counter()
        super().on_train_batch_end(*args)
        self.ends.append(time.perf_counter())
        self.seconds.append(self.ends[-1] - started)


class AsksInTurns(Preemption):
    """Asks whether a rank was told to stop, and has Checkpoints ask for the time, in steps whose turn it is."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Ask."""
        asks = variant(trainer.global_step - 1) == "agreement"
        trainer.checkpoint_callback.every_n_steps = None if asks else sys.maxsize
        if asks:
            super().on_train_batch_end(trainer, *args)

    def on_train_end(self, trainer: Any, *args: Any) -> None:
        """Ask many times, with nothing in between."""
        super().on_train_end(trainer, *args)
        started = time.perf_counter()
        for _ in range(CALLS):
            trainer.strategy.reduce_boolean_decision(False, all=False)
            trainer.strategy.broadcast(False)
        self.call_seconds = (time.perf_counter() - started) / CALLS


class FiltersInTurns(SkipSteps):
    """Filters the steps whose turn it is."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Keep the filter."""
        super().on_train_start(trainer, pl_module)
        self.filter = pl_module.step_filter

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """Put it in or take it out."""
        pl_module.step_filter = self.filter if variant(trainer.global_step) == "filter" else None

    def on_before_backward(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """Note the loss."""
        if pl_module.step_filter is not None:
            super().on_before_backward(trainer, pl_module, *args)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """Count."""
        if pl_module.step_filter is not None:
            super().on_train_batch_end(trainer, pl_module, *args)


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps")
    parser.add_argument("--every", type=int, required=True, help="steps between two saves, of a run alone")
    parser.add_argument("--folder", required=True, help="folder of the run")
    parser.add_argument("--figures", type=Path, required=True, help="file to write")
    arguments = parser.parse_args()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    watch = Stopwatch(every_n_steps=arguments.every) if ranks == 1 else Stopwatch(every_n_seconds=3600)
    asks, filters = (Preemption(), SkipSteps()) if ranks == 1 else (AsksInTurns(), FiltersInTurns())
    sections = read_sections([CONFIG])
    seed_everything(rank, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="auto" if ranks == 1 else "ddp",
        max_epochs=1,
        use_distributed_sampler=False,
        gradient_clip_val=sections["trainer"]["gradient_clip_val"],
        log_every_n_steps=sections["trainer"]["log_every_n_steps"],
        callbacks=[Watchdog(), filters, RoutingBias(), CostLedger(), asks, watch],
        logger=TensorBoardLogger(arguments.folder, name="", version="tensorboard"),
        default_root_dir=arguments.folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = random_batches(sections["data"]["init_args"], arguments.steps, ranks)
    trainer.fit(module_of(sections["model"]["init_args"]), batches)
    figures = {"ends": watch.ends, "save_part": watch.seconds, "threads": torch.get_num_threads()}
    if ranks > 1:
        figures |= {"call_seconds": asks.call_seconds, "variants": [*map(variant, range(arguments.steps))]}
    if rank == 0:
        arguments.figures.write_text(json.dumps(figures), encoding="utf-8")


def module_of(settings: dict[str, Any]) -> PretrainModule:
    """Return the module that the config describes."""
    shape = DeepSeekConfig.from_dict(settings["config"])
    schedule = WarmupStableDecay(**settings["lr_schedule"]["init_args"])
    return PretrainModule(**{**settings, "config": shape, "lr_schedule": schedule})


def random_batches(settings: dict[str, Any], steps: int, ranks: int) -> DataLoader[Any]:
    """Return a rank's part of as many batches as there are steps, of the config's size."""
    rows, seq_len = settings["batch_size"], settings["seq_len"]
    counts = {"step_tokens": rows * seq_len, "step_labels": rows * seq_len}
    drawn = torch.randint(settings["vocab_size"], (steps, rows // ranks, seq_len + 1))
    return DataLoader([{"input_ids": rows[:, :-1], "labels": rows[:, 1:], **counts} for rows in drawn], batch_size=None)


if __name__ == "__main__":
    main()
