"""Tokens a second of ``PretrainModule`` in an ordinary fit, and of a plain loop around transformers' model."""

import gc
import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from ds_lightning.bench.contest import BACKENDS, CONFIG, OURS, check_settings, contest_table, figures, in_turns, now
from ds_lightning.config import DeepSeekConfig
from ds_lightning.cost import find_hardware
from ds_lightning.flops import train_flops_per_token
from ds_lightning.generation.device import Device
from ds_lightning.models import DeepSeek
from ds_lightning.models.hf_config import config_values
from ds_lightning.training import PretrainModule

_LR = 1e-4
_CLIP = 1.0
_UNTIMED = 3
"""Steps of a training before the clock starts: allocation, the choice of kernels."""

Precision = Literal["fp32", "bf16"]


def bench_train(
    model: str | None = None,
    layers: int | None = None,
    repeats: int = 3,
    steps: int = 5,
    rows: int = 8,
    seq_len: int = 256,
    precision: Precision = "fp32",
    device: Device = "cpu",
) -> dict[str, Any]:
    """Measure both sides in turns: whole steps of random tokens, AdamW and clipping included, one micro-batch a step.

    In bf16 both sides keep fp32 weights and multiply in bfloat16, by autocast; the peer runs with weights and states in
    bfloat16 too, which is less work. Weights are random, and each router chooses by itself.

    Args:
        model: YAML file of a shape, such as ``configs/model/v2_lite.yaml``; none: a model of 1.1M parameters.
        layers: Of the shape's layers, only so many; none: all.
        repeats: Measured trainings of each side, after one that is not.
        steps: Measured steps of a training.
        rows: Rows of a step.
        seq_len: Tokens of a row.
        precision: ``fp32`` or ``bf16``.
        device: Where both sides run.

    Returns:
        Settings; seconds of every round, and tokens a second by their median; the ratio to the best peer; the last loss
        of each side in nats; on a GPU the FLOPs utilisation and the most memory of each side.

    Raises:
        ValueError: If transformers is not installed, or an argument is out of range.
    """
    counts = {"repeats": repeats, "steps": steps, "rows": rows, "seq_len": seq_len}
    check_settings("transformers", device, **counts)
    config = _shape(model, layers)
    if seq_len > config.max_position_embeddings:
        raise ValueError(
            f"seq_len is {seq_len}, expected at most {config.max_position_embeddings}, the model's context"
        )
    batches = _batches(config, steps + _UNTIMED, rows, seq_len)
    sides: dict[str, _Side] = {OURS: _Side(lambda side: _fit(side, config, batches, precision, device), device)}
    for name, backend, dtype in _peers(precision, device):
        sides[name] = _Side(_loop(config, batches, backend, dtype, precision, device), device)
    seconds = in_turns({name: side.train for name, side in sides.items()}, repeats)
    with torch.device("meta"):
        measured = figures(DeepSeek(config), device, seconds, steps * rows * seq_len, "tokens")
    measured["loss"] = {name: side.loss for name, side in sides.items()}
    if device == "cuda":
        measured |= _of_gpu(config, seq_len, measured, sides)
    return {**counts, "model": model, "layers": config.num_hidden_layers, "precision": precision, **measured}


def train_table(measured: dict[str, Any]) -> Table:
    """Return the figures for a terminal."""
    settings = f"{measured['layers']} layers, {measured['rows']} rows of {measured['seq_len']} tokens"
    return contest_table(measured, "train", settings, "tokens")


class _Side:
    """One side: trains anew again and again, and keeps the last loss and the most memory."""

    def __init__(self, run: Callable[["_Side"], None], device: Device) -> None:
        self.run, self.device = run, device
        self.ends: list[float] = []
        self.loss = float("nan")
        self.memory_gb = 0.0

    def train(self) -> float:
        """Train, and return the seconds of the measured steps."""
        self.ends = []
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on loaders and loggers
            self.run(self)
        if self.device == "cuda":
            self.memory_gb = max(self.memory_gb, torch.cuda.max_memory_allocated() / 1e9)
        gc.collect()  # of modules and their trainer, which hold one another
        return self.ends[-1] - self.ends[_UNTIMED - 1]

    def end_step(self, loss: Tensor) -> None:
        """Note the end of a step."""
        self.ends.append(now())
        self.loss = float(loss)


def _shape(model: str | None, layers: int | None) -> DeepSeekConfig:
    config = CONFIG
    if model is not None:
        config = DeepSeekConfig(**yaml.safe_load(Path(model).read_text(encoding="utf-8")))
    if layers is None:
        return config
    if not 1 <= layers <= config.num_hidden_layers:
        raise ValueError(f"layers is {layers}, expected 1 to the model's {config.num_hidden_layers}")
    return replace(config, num_hidden_layers=layers)


def _batches(config: DeepSeekConfig, steps: int, rows: int, seq_len: int) -> list[dict[str, Tensor]]:
    draw, count = torch.Generator().manual_seed(0), torch.tensor(rows * seq_len)
    drawn = (torch.randint(0, config.vocab_size, (rows, seq_len + 1), generator=draw) for _ in range(steps))
    return [
        {"input_ids": ids[:, :-1], "labels": ids[:, 1:].contiguous(), "step_tokens": count, "step_labels": count}
        for ids in drawn
    ]


class _Batches(LightningDataModule):
    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]


class _Ends(Callback):
    def __init__(self, side: _Side) -> None:
        self.side = side

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.side.end_step(trainer.callback_metrics["train/loss"])


def _fit(
    side: _Side, config: DeepSeekConfig, batches: list[dict[str, Tensor]], precision: Precision, device: Device
) -> None:
    """Train ours."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            default_root_dir=folder,
            accelerator=device,
            devices=1,
            precision="bf16-mixed" if precision == "bf16" else "32-true",
            max_epochs=1,
            gradient_clip_val=_CLIP,
            log_every_n_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[_Ends(side)],
        )
        tokens = sum(batch["labels"].numel() for batch in batches)
        trainer.fit(PretrainModule(config, tokens, lr=_LR), datamodule=_Batches(batches))


def _peers(precision: Precision, device: Device) -> list[tuple[str, str, torch.dtype]]:
    """Return name, backend and dtype of weights of what is worth measuring: on a GPU the loop over experts is not."""
    backends = BACKENDS if device == "cpu" else BACKENDS[:1]
    peers = [(f"transformers {backend}", backend, torch.float32) for backend in backends]
    if precision == "bf16":
        peers.append((f"transformers {BACKENDS[0]}, weights in bf16", BACKENDS[0], torch.bfloat16))
    return peers


def _loop(
    config: DeepSeekConfig,
    batches: list[dict[str, Tensor]],
    backend: str,
    dtype: torch.dtype,
    precision: Precision,
    device: Device,
) -> Callable[[_Side], None]:
    """Return what trains theirs."""
    import transformers

    values = config_values(config, dtype, eos_token_id=None, pad_token_id=None)

    def run(side: _Side) -> None:
        shape = transformers.AutoConfig.for_model(**values)
        with torch.device(device):
            network: Any = transformers.AutoModelForCausalLM.from_config(
                shape, dtype=dtype, attn_implementation="sdpa", experts_implementation=backend
            )
        optimizer = torch.optim.AdamW(network.parameters(), lr=_LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        for batch in batches:
            ids, labels = (batch[name].to(device) for name in ("input_ids", "labels"))
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16" and dtype == torch.float32):
                loss = network(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), _CLIP)
            optimizer.step()
            optimizer.zero_grad()
            side.end_step(loss.detach())

    return run


def _of_gpu(config: DeepSeekConfig, seq_len: int, measured: dict[str, Any], sides: dict[str, _Side]) -> dict[str, Any]:
    """Return what only a GPU has: a published peak, and a count of its memory."""
    found: dict[str, Any] = {"peak_memory_gb": {name: side.memory_gb for name, side in sides.items()}}
    hardware = find_hardware(measured["device"])
    if hardware is not None:
        flops = train_flops_per_token(config, seq_len)
        rates = measured["tokens_per_second"].items()
        found["mfu"] = {name: rate * flops / (hardware.bf16_tflops * 1e12) for name, rate in rates}
    return found
