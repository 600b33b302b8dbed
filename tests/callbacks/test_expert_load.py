"""Oracles: NumPy loops over the list of loads, a legend of known colours, event files read back with TensorBoard."""

import io
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor, nn

from ds_lightning.callbacks.expert_load import ExpertLoad, load_heatmap


def random_loads(steps: int, seed: int) -> list[Tensor]:
    """Return loads [3 layers, 8 experts] in which an expert gets nothing in four steps of five."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(1, 50, (3, 8), generator=generator) * (torch.rand(3, 8, generator=generator) < 0.2).float()
        + torch.nn.functional.one_hot(torch.zeros(3, dtype=torch.long), 8)
        for _ in range(steps)
    ]


def dead_by_loops(loads: list[Tensor], window: int) -> int:
    recent = np.stack([load.numpy() for load in loads[-window:]])
    return sum(
        all(recent[step, layer, expert] == 0 for step in range(len(recent)))
        for layer in range(recent.shape[1])
        for expert in range(recent.shape[2])
    )


def run(callback: ExpertLoad, loads: list[Tensor | None], first_step: int = 0) -> list[dict[str, float]]:
    """Show the callback two micro-batches a step and return what it logged in each step."""
    trainer = Mock(spec=Trainer, global_step=first_step, loggers=[])
    callback.on_train_start(trainer, Mock(spec=LightningModule))
    logged = []
    for load in loads:
        module = Mock(last_expert_load=load, step_skipped=False)
        callback.on_train_batch_end(trainer, module, None, None, 0)
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, None, 1)
        logged.append({name: float(value) for name, value in (call.args for call in module.log.call_args_list)})
    return logged


@pytest.mark.parametrize("window", [1, 4, 7])
def test_dead_experts_are_those_without_a_token_in_the_window(window: int) -> None:
    loads = random_loads(12, seed=window)
    logged = run(ExpertLoad(window=window), list(loads))
    expected = [dead_by_loops(loads[: i + 1], window) for i in range(12)]
    assert [step["moe/dead_experts"] for step in logged] == expected
    assert min(expected) < max(expected)


def test_max_violation_is_the_mean_over_layers_of_the_fullest_expert_over_the_mean() -> None:
    for load in random_loads(5, seed=0):
        (logged,) = run(ExpertLoad(), [load])
        expected = np.mean([max(row) / np.mean(row) - 1 for row in load.numpy()])
        assert logged["moe/max_violation"] == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_counts_dead_experts_like_one_never_stopped() -> None:
    loads = random_loads(10, seed=3)
    whole = run(ExpertLoad(window=6), list(loads))
    first, second = ExpertLoad(window=6), ExpertLoad(window=6)
    run(first, list(loads[:4]))
    stored = io.BytesIO()
    torch.save(first.state_dict(), stored)
    stored.seek(0)
    second.load_state_dict(torch.load(stored, weights_only=True))
    assert run(second, list(loads[4:]), first_step=4) == whole[4:]


def test_a_dense_model_logs_nothing() -> None:
    assert run(ExpertLoad(every_n_steps=1), [None, None]) == [{}, {}]


@pytest.mark.parametrize("name", ["every_n_steps", "window"])
def test_a_number_of_steps_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"ExpertLoad: {name} is 0, expected at least 1"):
        ExpertLoad(**{name: 0})


def test_heatmap_shows_layers_as_rows_and_experts_as_columns() -> None:
    ratio = np.ones((2, 40))
    ratio[0, 3], ratio[1, 5], ratio[1, 6] = 0.0, 2.0, 9.0
    image = load_heatmap(ratio).astype(int)
    cell = image.shape[1] // 40
    centre = [[image[12 * row + 6, cell * column + cell // 2] for column in range(40)] for row in range(2)]
    blue, red = centre[0][3], centre[1][5]
    assert blue[2] > blue[0] + 40
    assert red[0] > red[2] + 40
    assert np.array_equal(red, centre[1][6])
    fair = [pixel for row in centre for pixel in row if min(pixel) > 230]
    assert len(fair) == 2 * 40 - 3
    assert np.array_equal(image[0, cell * 3], blue)  # the cell fills its box from corner to corner
    assert np.array_equal(image[11, cell * 4 - 1], blue)
    assert not np.array_equal(image[11, cell * 4], blue)


@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (4, 16), (59, 256), (2, 1000)])
def test_heatmap_is_wide_enough_to_read_and_has_a_legend_in_every_shape(layers: int, experts: int) -> None:
    image = load_heatmap(np.ones((layers, experts)))
    assert image.dtype == np.uint8
    assert image.shape[1] >= max(280, 3 * experts)
    legend = image[12 * layers :]
    assert image.shape[0] - 12 * layers == 36
    assert len(np.unique(legend.reshape(-1, 3), axis=0)) > 50
    assert (legend[:, 170:] < 100).any()


class Routed(LightningModule):
    """Stands in for the pretraining module: a new load every optimizer step."""

    def __init__(self, loads: list[Tensor]) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)
        self.loads = loads
        self.last_expert_load: Tensor | None = None
        self.step_skipped = False

    def training_step(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.line(batch).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SetLoad(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pl_module.last_expert_load = pl_module.loads[trainer.global_step - 1] if trainer.global_step else None


def test_a_fit_with_accumulation_logs_once_a_step_to_tensorboard(tmp_path: Path) -> None:
    loads = random_loads(4, seed=5)
    trainer = Trainer(
        max_steps=4,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=TensorBoardLogger(tmp_path, name="", version=""),
        callbacks=[SetLoad(), ExpertLoad(every_n_steps=2, window=3)],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Routed(loads), torch.ones(8, 1, 1))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    dead = [point.value for point in events.Scalars("moe/dead_experts")]
    assert dead == [dead_by_loops(loads[: i + 1], 3) for i in range(4)]
    assert len(events.Scalars("moe/max_violation")) == 4
    images = events.Images("moe/load")
    assert [image.step for image in images] == [2, 4]
    for image, load in zip(images, (loads[1], loads[3]), strict=True):
        drawn = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
        assert np.array_equal(drawn, load_heatmap((load / load.mean(dim=1, keepdim=True)).numpy()))
