"""Reinforcement learning and fine-tuning on two ranks, or on one for comparison; the toys of ``toy_rollouts``."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from ds_lightning.data import SFTDataModule
from ds_lightning.rl.rewards import Reward
from ds_lightning.training import PretrainModule, ZeRO
from tests.models.tiny_export import CONFIG
from tests.training.toy_rollouts import LETTER, MODEL, REWARD, Record, train
from tests.training.toy_zero import Curves, whole_weights

REWARDS = {
    "letter": LETTER,
    "length": Reward(f"{REWARD}:counts"),
    "dislikes ccc": Reward(f"{REWARD}:dislikes", options={"prompt": "ccc"}),
}
SFT_SHAPE = replace(CONFIG, vocab_size=280)


class Stop(Callback):
    """Ends a run after some step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


def layout(strategy: str) -> dict[str, Any]:
    """Return the trainer's options for ``one`` process, or two under ``ddp`` or a stage of ZeRO."""
    if strategy == "one":
        return {}
    return {"devices": 2, "strategy": "ddp" if strategy == "ddp" else ZeRO(int(strategy))}  # type: ignore[arg-type]


def attempt(
    folder: str, strategy: str, reward: str, *, stop: int = 0, resume: bool = False, **settings: Any
) -> dict[str, Any]:
    """Train for two rollouts of two steps; three problems with four answers, so that two ranks share one of them."""
    module = {"eps": 1e-3, "weight_decay": 0.1, "beta": 0.1, "ref_update_steps": 3}
    defaults: dict[str, Any] = {"rollouts": 2, "prompts": 3, "num_generations": 4, "steps_per_rollout": 2}
    defaults["model"] = replace(MODEL, num_nextn_predict_layers=1)
    try:
        policy, record = train(
            Path(folder),
            *([Stop(stop)] if stop else []),
            resume=resume,
            module=module,
            reward=REWARDS[reward],
            trainer={"gradient_clip_val": 0.5, **layout(strategy)},
            **{**defaults, **settings},
        )
    except (ValueError, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    counters = policy.steps_done, policy.tokens_seen, policy.useful_samples
    return {"counters": counters, "weights": whole_weights(policy.trainer, policy), **_told(record)}


def _told(record: Record) -> dict[str, Any]:
    return {"batches": record.batches, "advantages": record.advantages, "logged": record.logged}


def fine_tune(folder: str, strategy: str) -> dict[str, Any]:
    """Train on the conversations in a folder four times."""
    torch.manual_seed(0)
    data = SFTDataModule(
        sources=[f"{folder}/a.jsonl"],
        folder=f"{folder}/prepared",
        tokenizer=f"{folder}/tokenizer.json",
        seq_len=64,
        batch_size=4,
        epochs=4,
        val_fraction=0.2,
    )
    curves = Curves()
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options: dict[str, Any] = {**silent, "enable_model_summary": False, **layout(strategy)}
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[curves],
        log_every_n_steps=1,
        limit_val_batches=0,
        **{"devices": 1, **options},
    )
    module = PretrainModule(SFT_SHAPE, lr=1e-2, eps=1e-3)
    trainer.fit(module, datamodule=data)
    return {"points": curves.points, "weights": whole_weights(trainer, module)}


def main(runs: str, sft: str) -> dict[str, Any]:
    """Make all attempts one after the other."""
    results = {name: attempt(**run) for name, run in json.loads(runs).items()}
    return {**results, "sft": fine_tune(sft, "2")} if sft else results
