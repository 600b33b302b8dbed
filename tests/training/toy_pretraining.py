"""Pretraining in this process: a small model with experts and two prediction modules, on rows drawn at random.

A quarter of the labels is not counted, more in some rows than in others, so that a mean of means over rows,
micro-batches or ranks is not the mean over tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from ds_lightning.config import DeepSeekConfig
from ds_lightning.losses.next_token import IGNORE
from ds_lightning.training import PretrainModule

CONFIG = DeepSeekConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=3,
    intermediate_size=24,
    num_attention_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=10,
    first_k_dense_replace=1,
    num_nextn_predict_layers=2,
    max_position_embeddings=64,
    initializer_range=0.3,
)
ROWS, SEQ = 8, 12

Batch = dict[str, Any]


def draw_step(seed: int, *, documents: bool = False) -> Batch:
    """Return all rows of an optimizer step; ``documents``: of two documents each."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(CONFIG.vocab_size, (ROWS, SEQ + 1), generator=rng)
    labels = tokens[:, 1:].clone()
    dropped = torch.rand(ROWS, SEQ, generator=rng) < torch.linspace(0, 0.5, ROWS)[:, None]
    labels[dropped] = IGNORE
    counted = int((labels != IGNORE).sum())
    batch = {"input_ids": tokens[:, :-1].clone(), "labels": labels, "step_tokens": counted, "step_labels": counted}
    if documents:
        batch["segment_ids"] = (torch.arange(SEQ) >= torch.randint(1, SEQ, (ROWS, 1), generator=rng)).long()
    return batch


def split(step: Batch, parts: int) -> list[Batch]:
    """Return the micro-batches of a step, or what each rank has of it."""
    pieces = {name: value.chunk(parts) for name, value in step.items() if isinstance(value, Tensor)}
    return [
        {
            **{name: piece[part] for name, piece in pieces.items()},
            "step_tokens": step["step_tokens"],
            "step_labels": step["step_labels"],
        }
        for part in range(parts)
    ]


class Rows(LightningDataModule):
    """Batches as they are given; the bytes of token i are i mod 5."""

    token_bytes = np.arange(CONFIG.vocab_size, dtype=np.uint16) % 5

    def __init__(self, train: Sequence[Batch], val: Sequence[Batch] = ()) -> None:
        super().__init__()
        self.train, self.val = list(train), list(val)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, batch_size=None)  # type: ignore[arg-type]

    predict_dataloader = test_dataloader = val_dataloader


class Recorder(Callback):
    """Keeps the gradients, before clipping, and the learning rate of every optimizer step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None})
        self.rates.append(optimizer.param_groups[0]["lr"])


def build(total_tokens: int = 10_000, **settings: Any) -> PretrainModule:
    """Return a module whose weights depend on nothing but the settings."""
    module = PretrainModule(settings.pop("config", CONFIG), total_tokens, **settings)
    torch.manual_seed(0)
    module.configure_model()
    return module


def trainer(*callbacks: Callback, accumulate: int = 1, **options: Any) -> Trainer:
    """Return a trainer that is silent and writes nothing."""
    defaults: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=list(callbacks),
        accumulate_grad_batches=accumulate,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**defaults, **options},
    )


def fit(module: PretrainModule, steps: Sequence[Batch], *callbacks: Callback, **options: Any) -> Trainer:
    """Train on these steps, each split into ``accumulate`` micro-batches."""
    run = trainer(*callbacks, **options)
    run.fit(module, Rows([micro for step in steps for micro in split(step, run.accumulate_grad_batches)]))
    return run
