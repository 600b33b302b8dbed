"""Oracles: a clock that moves by known steps, FLOPs and peaks by hand, and one real fit."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from ds_lightning.callbacks import throughput
from ds_lightning.callbacks.throughput import Throughput, measure_peak_tflops
from ds_lightning.config import DeepSeekConfig
from ds_lightning.flops import train_flops_per_token

CONFIG = DeepSeekConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    intermediate_size=24,
    num_attention_heads=2,
    kv_lora_rank=5,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=3,
    num_nextn_predict_layers=1,
)
BATCH = {"input_ids": torch.zeros(2, 8, dtype=torch.int64)}


class Run:
    """Drives the callback by hand: what a trainer would call, on a clock that the test moves."""

    def __init__(self, callback: Any, monkeypatch: pytest.MonkeyPatch, world_size: int = 1) -> None:
        self.now = 100.0
        monkeypatch.setattr("ds_lightning.callbacks.throughput.time.perf_counter", lambda: self.now)
        monkeypatch.setattr(throughput, "measure_peak_tflops", lambda device, dtype: 2e-6)
        self.callback = callback
        self.trainer: Any = SimpleNamespace(
            is_global_zero=True, global_step=0, world_size=world_size, precision="32-true"
        )
        self.values: dict[str, float] = {}
        self.module: Any = SimpleNamespace(tokens_seen=0, config=CONFIG, device=torch.device("cpu"), log=self.log)
        callback.on_fit_start(self.trainer, self.module)
        callback.on_train_start(self.trainer, self.module)

    def log(self, name: str, value: float, **_: Any) -> None:
        self.values[name] = value

    def batch(self, seconds: float, *, steps: int = 1, tokens: int = 16) -> None:
        self.callback.on_train_batch_start(self.trainer, self.module, BATCH, 0)
        self.now += seconds
        self.trainer.global_step += steps
        self.module.tokens_seen += tokens
        self.callback.on_train_batch_end(self.trainer, self.module, None, BATCH, 0)


def test_speed_is_tokens_over_time_without_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Throughput(window=10), monkeypatch)
    run.batch(50)
    assert run.values == {}
    run.batch(2)
    run.batch(1)
    run.batch(1)
    assert run.values["speed/tokens_per_second"] == pytest.approx(48 / 4)
    assert run.values["speed/step_seconds"] == pytest.approx(4 / 3)


def test_only_the_window_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Throughput(window=2), monkeypatch)
    for seconds in (50, 30, 1, 3):
        run.batch(seconds)
    assert run.values["speed/tokens_per_second"] == pytest.approx(32 / 4)


def test_micro_batches_are_part_of_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Throughput(), monkeypatch)
    run.batch(1)
    run.batch(3, steps=0, tokens=0)
    run.values.clear()
    run.batch(1, tokens=32)
    assert run.values["speed/tokens_per_second"] == pytest.approx(32 / 4)
    assert run.values["speed/step_seconds"] == pytest.approx(4)


def test_validation_and_checkpoints_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Throughput(), monkeypatch)
    run.batch(1)
    run.callback.on_validation_start(run.trainer, run.module)
    run.now += 100
    run.batch(1)
    run.callback.on_save_checkpoint(run.trainer, run.module, {})
    run.now += 50
    run.callback.on_validation_start(run.trainer, run.module)
    run.now += 50
    run.batch(1)
    assert run.values["speed/step_seconds"] == pytest.approx(1)


def test_waiting_for_data_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Throughput(), monkeypatch)
    run.batch(1)
    run.now += 4
    run.batch(1)
    assert run.values["speed/step_seconds"] == pytest.approx(5)


def test_mfu_is_the_closed_form_with_its_prediction_module_over_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Throughput(), monkeypatch, world_size=4)
    run.batch(1)
    run.batch(2)
    flops = 16 / 2 * train_flops_per_token(CONFIG, 8, include_mtp=True)
    assert run.values["cost/mfu"] == pytest.approx(flops / (4 * 2e6))
    assert run.values["speed/peak_tflops"] == 2e-6


def test_a_known_device_has_its_dense_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Throughput(), monkeypatch)
    run.module.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    run.callback.on_fit_start(run.trainer, run.module)
    assert run.callback.peak_tflops == 989.5
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 NVL")
    run.callback.on_fit_start(run.trainer, run.module)
    assert run.callback.peak_tflops == 2e-6


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("bf16-mixed", torch.bfloat16),
        ("32-true", torch.float32),
        ("16-true", torch.float16),
        ("64-true", torch.float64),
    ],
)
def test_a_measured_peak_is_in_the_precision_of_the_training(
    monkeypatch: pytest.MonkeyPatch, precision: str, dtype: torch.dtype
) -> None:
    run = Run(Throughput(), monkeypatch)
    asked: list[torch.dtype] = []

    def measure(device: torch.device, dtype: torch.dtype) -> float:
        asked.append(dtype)
        return 1.0

    monkeypatch.setattr(throughput, "measure_peak_tflops", measure)
    run.trainer.precision = precision
    run.callback.on_fit_start(run.trainer, run.module)
    assert asked == [dtype]


def test_the_measured_peak_is_that_of_a_matmul_and_leaves_the_seed_alone() -> None:
    state = torch.get_rng_state()
    peak = measure_peak_tflops(torch.device("cpu"), torch.float32, seconds=0.1)
    assert torch.equal(state, torch.get_rng_state())
    left = torch.randn(1024, 1024)
    began = time.perf_counter()
    for _ in range(3):
        left @ left
    mean = 3 * 2 * 1024**3 / (time.perf_counter() - began) / 1e12
    assert mean / 3 < peak < mean * 30


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="Throughput: window is 0, expected at least 1"):
        Throughput(window=0)


class Toy(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = CONFIG
        self.tokens_seen = 0

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        time.sleep(0.02)
        self.tokens_seen += 8
        return self.weight.square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_real_fit_logs_every_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "measure_peak_tflops", lambda device, dtype: 1.0)
    data: Any = [{"input_ids": torch.zeros(8, dtype=torch.int64)} for _ in range(4)]
    trainer = Trainer(
        callbacks=[Throughput()],
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Toy(), DataLoader(data))
    metrics = trainer.logged_metrics
    assert 50 < metrics["speed/tokens_per_second"] <= 8 / 0.02
    assert metrics["speed/step_seconds"] * metrics["speed/tokens_per_second"] == pytest.approx(8, rel=1e-4)
    assert 0 < metrics["cost/mfu"] < 1
