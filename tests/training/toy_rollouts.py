"""Reinforcement learning in this process, or on one of some ranks: a random model, rewarded for writing one letter."""

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from ds_lightning.callbacks import Checkpoints
from ds_lightning.config import DeepSeekConfig
from ds_lightning.data.corpus import Document
from ds_lightning.data.tokenizer import train_tokenizer
from ds_lightning.rl.rewards import Reward
from ds_lightning.rl.rollouts import RolloutDataModule
from ds_lightning.rl.tasks import Problem, Split
from ds_lightning.training import GRPOModule

REWARD = Path(__file__).parents[1] / "rl" / "reward_functions.py"
LETTER = Reward(f"{REWARD}:share_of_letter", options={"letter": "e"})
VOCAB_SIZE = 288
MODEL = DeepSeekConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=48,
    num_attention_heads=2,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    first_k_dense_replace=1,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=16,
    max_position_embeddings=64,
)


class Letters:
    """Prompts of one to three letters; what is rewarded is the same for all."""

    name = "letters"

    def problem(self, index: int, seed: int, split: Split = "train") -> Problem:
        return Problem(chr(97 + (index + seed) % 26) * (1 + index % 3), {"answer": "e", "check": "exact"})


class Record(Callback):
    """What every step logged, and the tokens of every batch."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, list[list[int]]]] = []
        self.advantages: list[list[float]] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append((trainer.global_step, plain_rows(batch).tolist()))
        self.advantages.append(batch["advantages"].where(batch["mask"].any(1), math.nan).tolist())

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def plain_rows(batch: Any) -> torch.Tensor:
    """Return prompt and completion of each row one behind the other, padded with zeros."""
    rows = []
    for prompt, own, kept in zip(batch["prompt"].tolist(), batch["completion_ids"], batch["mask"], strict=True):
        rows.append(torch.cat((batch["prompt_ids"][prompt, : batch["prompt_lengths"][prompt]], own[kept])))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def write_tokenizer(folder: Path) -> str:
    """Return the path of a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "every letter of the alphabet: abcdefghijklmnopqrstuvwxyz " * 4
    train_tokenizer([Document(text, "letters")], VOCAB_SIZE).save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def train(
    folder: Path,
    *callbacks: Callback,
    accumulate: int = 1,
    resume: bool = False,
    module: dict[str, Any] | None = None,
    model: DeepSeekConfig = MODEL,
    reward: Reward = LETTER,
    trainer: dict[str, Any] | None = None,
    **data: Any,
) -> tuple[GRPOModule, Record]:
    """Run a fit with its checkpoints in the folder; return the module and what happened.

    A tokenizer that is in the folder is taken: ranks find one there.
    """
    from ds_lightning.training import checkpoint

    seed_everything(0, verbose=False)
    record = Record()
    runs = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        log_every_n_steps=1,
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[record, *callbacks, Checkpoints(every_n_steps=1)],
        **{"devices": 1, **(trainer or {})},
    )
    tokenizer = folder / "tokenizer.json"
    settings: dict[str, Any] = {"rollouts": 6, "prompts": 4, "num_generations": 4, "max_completion_length": 6}
    datamodule = RolloutDataModule(
        task=Letters(),
        rewards=[reward],
        tokenizer=str(tokenizer) if tokenizer.is_file() else write_tokenizer(folder),
        workers=1,
        **{**settings, **data},
    )
    policy = GRPOModule(model, **{"lr": 3e-3, "weight_decay": 0.0, **(module or {})})
    newest, _ = checkpoint.newest_valid(folder / "checkpoints")
    runs.fit(policy, datamodule=datamodule, ckpt_path=newest / checkpoint.STATE if resume and newest else None)
    return policy, record
