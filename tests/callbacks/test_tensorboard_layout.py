"""Oracles: the event files read back with TensorBoard's own reader, and its matching rule (``re.match``) by hand."""

import re
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader  # type: ignore[import-untyped]
from tensorboard.plugins.custom_scalar import layout_pb2  # type: ignore[import-untyped]
from torch import Tensor, nn

from ds_lightning.callbacks.tensorboard_layout import TensorBoardLayout, custom_scalars_layout

SHOWN = [
    *("train/loss", "train/lr", "train/grad_norm", "val/loss", "val/ppl", "val/bits_per_byte"),
    *("moe/max_violation", "moe/dead_experts", "speed/tokens_per_second", "speed/step_seconds"),
    *("cost/usd", "cost/device_hours", "cost/tokens_per_usd", "cost/mfu"),
]


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)

    def training_step(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.line(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, **hparams: int) -> None:
    logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    if hparams:
        logger.log_hyperparams(hparams)
    trainer = Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=logger,
        callbacks=[TensorBoardLayout()],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Line(), torch.ones(3, 1, 1))


def layouts(folder: Path) -> Iterator[layout_pb2.Layout]:
    for path in folder.glob("events*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "custom_scalars":
                    yield layout_pb2.Layout.FromString(value.tensor.string_val[0])


def test_a_fit_writes_the_four_categories_in_their_order(tmp_path: Path) -> None:
    fit(tmp_path)
    (layout,) = layouts(tmp_path)
    assert [category.title for category in layout.category] == ["Cost", "Loss", "MoE", "Speed"]
    cost = next(category for category in layout.category if category.title == "Cost")
    assert [list(chart.multiline.tag) for chart in cost.chart] == [
        ["^cost/usd$"],
        ["^cost/device_hours$"],
        ["^cost/tokens_per_usd$"],
        ["^cost/mfu$"],
    ]


def test_a_resumed_run_keeps_its_one_layout_and_another_folder_gets_its_own(tmp_path: Path) -> None:
    for _ in range(3):
        fit(tmp_path / "a", width=1)
    fit(tmp_path / "b")
    assert len(list((tmp_path / "a").glob("events*"))) >= 3
    assert len(list(layouts(tmp_path / "a"))) == 1
    assert len(list(layouts(tmp_path / "b"))) == 1


def test_every_metric_is_drawn_in_exactly_one_chart_and_no_chart_takes_more_than_it_names() -> None:
    patterns = [
        pattern for charts in custom_scalars_layout().values() for _, names in charts.values() for pattern in names
    ]
    for name in SHOWN:
        assert sum(bool(re.match(pattern, name)) for pattern in patterns) == 1, name
        assert not any(re.match(pattern, name + "_per_useful_sample") for pattern in patterns), name


def test_training_and_validation_loss_share_a_chart() -> None:
    assert custom_scalars_layout()["Loss"]["loss"] == ["Multiline", ["^train/loss$", "^val/loss$"]]


def test_only_the_first_rank_writes() -> None:
    logger = Mock(spec=TensorBoardLogger)
    TensorBoardLayout().on_fit_start(Mock(spec=Trainer, is_global_zero=False, loggers=[logger]), Line())
    assert not logger.mock_calls
