"""Progress of a run in tokens and dollars."""

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn
from torch import Tensor

# Long enough to hold several samples when one step takes minutes.
_SPEED_WINDOW_SECONDS = 600.0


class ProgressBar(LightningProgressBar):
    """Shows tokens, loss, validation bits per byte, speed, dollars and time left of a fit on stderr.

    On a terminal it is one live line, elsewhere a plain line from time to time. Reads ``pl_module.tokens_seen`` and
    ``pl_module.total_tokens``, and ``train/loss``, ``val/bits_per_byte`` and ``cost/usd`` of the logged metrics, each
    shown once it is known. Only the first rank writes.

    Args:
        refresh_seconds: Time between two readings for the live line; each reading waits for the device.
        line_seconds: Time between two plain lines.
    """

    def __init__(self, refresh_seconds: float = 0.5, line_seconds: float = 30.0) -> None:
        super().__init__()
        self.refresh_seconds = refresh_seconds
        self.line_seconds = line_seconds
        self._enabled = True
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._last_reading = 0.0

    def disable(self) -> None:
        """Write nothing from now on."""
        self._enabled = False
        self._close()

    def enable(self) -> None:
        """Write again from the next fit on."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Show the bar, from where a resumed run stands."""
        if not self._enabled:
            return
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[status]}", markup=False),
            console=console,
            refresh_per_second=4,
            speed_estimate_period=_SPEED_WINDOW_SECONDS,
        )
        self._task = self._progress.add_task(
            self.train_description, total=pl_module.total_tokens, completed=pl_module.tokens_seen, status=""
        )
        self._progress.advance(self._task, 0)  # the speed counts from here
        self._last_reading = time.monotonic()
        if sys.stderr.isatty() and not console.is_dumb_terminal:
            self._progress.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Bring the line up to date, when it is time to."""
        if self._progress is None:
            return
        live = self._progress.live.is_started
        if time.monotonic() - self._last_reading >= (self.refresh_seconds if live else self.line_seconds):
            self._show(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that the model is being validated."""
        if self._progress is not None:
            self._progress.update(self._task, description=self.validation_description)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that training goes on."""
        if self._progress is not None:
            self._progress.update(self._task, description=self.train_description)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Show the final state and leave the line standing."""
        if self._progress is not None:
            self._show(trainer, pl_module)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the terminal back."""
        self._close()

    def _show(self, trainer: Trainer, pl_module: Any) -> None:
        assert self._progress is not None
        self._last_reading = time.monotonic()
        seen, progress = pl_module.tokens_seen, pl_module.progress  # a budget may end the run before its tokens do
        self._progress.update(self._task, completed=seen, total=seen / progress if progress else pl_module.total_tokens)
        task = self._progress.tasks[self._task]
        status = status_text(task, trainer.callback_metrics)
        if self._progress.live.is_started:
            self._progress.update(self._task, status=status)
        else:
            print(f"{task.description}  {status}", file=sys.stderr, flush=True)

    def _close(self) -> None:
        if self._progress is not None and self._progress.live.is_started:
            self._progress.stop()
        self._progress = None


def status_text(task: Task, metrics: Mapping[str, Tensor]) -> str:
    """Return the part of the line after the bar; metrics that are not known yet are left out."""
    parts = [f"{task.percentage:.0f}%", f"{_compact(task.completed)}/{_compact(task.total or 0)} tokens"]
    if "train/loss" in metrics:
        parts.append(f"loss {float(metrics['train/loss']):.3f}")
    if "val/bits_per_byte" in metrics:
        parts.append(f"val {float(metrics['val/bits_per_byte']):.3f} bits/byte")
    if task.speed is not None:
        parts.append(f"{_compact(task.speed)} tokens/s")
    if "cost/usd" in metrics:
        usd = float(metrics["cost/usd"])
        parts.append(f"${usd:.4f}" if usd < 1 else f"${usd:,.2f}")
    if task.finished_time is not None:
        parts.append(f"in {timedelta(seconds=round(task.finished_time))}")
    elif task.time_remaining is not None:
        parts.append(f"{timedelta(seconds=round(task.time_remaining))} left")
    return "  ".join(parts)


def _compact(number: int | float) -> str:
    """Write a count with three to four figures: 950, 12.3k, 4.00M, 14.80T."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f}{suffix}"
    return f"{number / 1e3:.1f}k" if number >= 1e3 else f"{number:.0f}"
