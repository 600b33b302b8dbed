"""When the speed of training is measured and logged."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ds_lightning.cost import find_hardware
from ds_lightning.flops import train_flops_per_token

_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}


class Throughput(Callback):
    """Logs ``speed/tokens_per_second``, ``speed/step_seconds``, ``speed/peak_tflops`` and ``cost/mfu``.

    All at optimizer steps. Speeds are means over the last ``window`` of them, without the first step (allocation,
    compilation) and without validation and checkpoints. Model FLOP utilisation is the closed form of the FLOPs, causal
    attention and multi-token prediction included, over the dense bfloat16 peak of the devices, whatever the training's
    precision. A device that the list of hardware does not have, a CPU above all, gets a peak measured once at the
    start: the best matmul of about half a second in the training's precision.

    Args:
        window: Optimizer steps to average over.

    Raises:
        ValueError: If ``window`` is below 1.
    """

    def __init__(self, window: int = 20) -> None:
        if window < 1:
            raise ValueError(f"Throughput: window is {window}, expected at least 1")
        self.peak_tflops = 0.0
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=window + 1)  # seconds, steps, tokens
        self._paused_seconds = 0.0
        self._paused_at: float | None = None
        self._last_step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the device's peak up, or measure it."""
        if not trainer.is_global_zero:
            return
        device = pl_module.device
        hardware = find_hardware(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        dtype = _DTYPES.get(str(trainer.precision).partition("-")[0], torch.float32)
        self.peak_tflops = hardware.bf16_tflops if hardware else measure_peak_tflops(device, dtype)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from where the run stands."""
        self._marks.clear()
        self._last_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Training goes on: let the clock run again."""
        if self._paused_at is not None:
            self._paused_seconds += time.perf_counter() - self._paused_at
            self._paused_at = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log after an optimizer step."""
        if not trainer.is_global_zero or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self._marks.append(
            (time.perf_counter() - self._paused_seconds, trainer.global_step, int(pl_module.tokens_seen))
        )
        if len(self._marks) < 2:
            return
        seconds, steps, tokens = (last - first for first, last in zip(self._marks[0], self._marks[-1], strict=True))
        rows = (batch[name] for name in ("input_ids", "prompt_ids", "completion_ids") if name in batch)
        flops = tokens * train_flops_per_token(pl_module.config, sum(row.shape[-1] for row in rows))
        metrics = {
            "speed/tokens_per_second": tokens / seconds,
            "speed/step_seconds": seconds / steps,
            "speed/peak_tflops": self.peak_tflops,
            "cost/mfu": flops / seconds / (self.peak_tflops * 1e12 * trainer.world_size),
        }
        for name, value in metrics.items():
            pl_module.log(name, value, prog_bar=name == "speed/tokens_per_second", rank_zero_only=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock until the next batch."""
        self._pause()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stop the clock until the next batch."""
        self._pause()

    def _pause(self) -> None:
        if self._paused_at is None:
            self._paused_at = time.perf_counter()


def measure_peak_tflops(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Return the speed of the fastest of the square matmuls that fit into a time, in TFLOP/s.

    Operands are random, since zeros run faster than any training, and come from a generator of their own.

    Args:
        device: Where to multiply, with all of torch's threads on a CPU.
        dtype: Type of the operands.
        seconds: Time to measure for; at least three matmuls run.
    """
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    best, runs, began = float("inf"), 0, time.perf_counter()
    while runs < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        runs += 1
    return 2 * size**3 / best / 1e12
