"""Two real processes against one: oracles are the gradients of one batch in fp64, and the loads of both added up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from ds_lightning.callbacks import RoutingBias
from tests.callbacks.test_routing_bias import EXPERTS, GAMMA, LAYERS, biases, count, moved
from tests.training.test_pretrain import HEAVY, plain_gradients, plain_terms, worst
from tests.training.toy_pretraining import Rows, build, draw_step, split

RANKS, ACCUMULATE = 2, 2


class SharedRows(Rows):
    """Gives each rank its micro-batches of the step."""

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        return DataLoader(self.train[self.trainer.global_rank :: RANKS], batch_size=None)  # type: ignore[arg-type]


class Keep(Callback):
    """Writes what each rank has in its optimizer step, and after it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = {name: p.grad for name, p in pl_module.named_parameters()}
        torch.save(gradients, self.folder / f"gradients{trainer.global_rank}.pt")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        found = {
            "loss": trainer.callback_metrics["train/loss"],
            "load": pl_module.last_expert_load,
            "biases": torch.tensor(biases(pl_module.model)),
            "tokens": torch.tensor(pl_module.tokens_seen),
        }
        torch.save(found, self.folder / f"end{trainer.global_rank}.pt")


@pytest.mark.slow
def test_two_ranks_take_the_step_of_one(tmp_path: Path) -> None:
    step, module = draw_step(0), build(**HEAVY, bias_update_speed=GAMMA)
    assert module.model is not None
    expected = plain_gradients(module, step, 0.4, 0.5)
    loss = float(plain_terms(build(**HEAVY).double().model, step)[0])  # type: ignore[arg-type]
    load = count(module.model, step)
    Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy="ddp_spawn",
        use_distributed_sampler=False,
        accumulate_grad_batches=ACCUMULATE,
        max_epochs=1,
        callbacks=[RoutingBias(), Keep(tmp_path)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, SharedRows(split(step, RANKS * ACCUMULATE)))
    for rank in range(RANKS):
        # As in test_pretrain: a few units of fp32, where a mean of means differs by more than a hundredth.
        assert worst(torch.load(tmp_path / f"gradients{rank}.pt"), expected) < 5e-6
        end = torch.load(tmp_path / f"end{rank}.pt")
        assert float(end["loss"]) == pytest.approx(loss, rel=1e-6)
        assert end["load"].int().tolist() == load
        assert end["biases"].tolist() == moved([[0.0] * EXPERTS] * LAYERS, load, GAMMA)
        assert int(end["tokens"]) == step["step_tokens"]
