"""What becomes of an optimizer step whose loss or gradient is not a number, or far from those before."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from ds_lightning.training.failure import fail_together
from ds_lightning.training.step_filter import StepFilter, filter_zero_steps
from ds_lightning.training.strategy import ZeRO


class SkipSteps(Callback):
    """Skips optimizer steps that would do harm, counts them, and ends a run that makes no others.

    A skipped step leaves weights, optimizer, routing biases and statistics of load as they were. Its tokens are
    consumed: the order of data, the schedule and the number of steps are those of a run without the skip. A step is
    skipped where its loss or the norm of its gradient is not finite and, with ``sigma``, where one of them is a spike.

    Spikes are let through unless asked for: DeepSeek-V3 was trained without such a rule (arXiv:2412.19437, section 1),
    norms of gradients have heavy tails in small batches and in reinforcement learning, and a loss that rises for a good
    reason, such as new data, would end the run. For a long pretraining 6 over 128 steps is what OLMo-core uses.

    Logs ``train/skipped_steps``, the number of the run so far. On a GPU the host learns of a step after the next one,
    so that it never waits: a run may then end one step late. The newest checkpoint is intact all the same.

    Args:
        end_after: Skipped steps in a row that end the run with status 1.
        sigma: Standard deviations above the mean of the window that make a spike; none: nothing does.
        window: Steps that were made, and that spikes are measured against.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, end_after: int = 10, sigma: float | None = None, window: int = 128) -> None:
        if end_after < 1:
            raise ValueError(f"skip_steps.end_after is {end_after}, expected at least 1")
        if sigma is not None and not sigma > 0:
            raise ValueError(f"skip_steps.sigma is {sigma}, expected more than 0 or null")
        if window < 2:
            raise ValueError(f"skip_steps.window is {window}, expected at least 2")
        self.end_after = end_after
        self._filter = StepFilter(sigma, window, mean=lambda tensor: tensor)
        self._in_a_row: Tensor | int = 0
        self._reading: _Reading | None = None
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Have every step asked for."""
        self._step = trainer.global_step
        self._reading = None
        self._filter.mean = partial(trainer.strategy.reduce, reduce_op="mean")
        self._filter.end_step()
        pl_module.step_filter = self._filter
        if isinstance(trainer.strategy, ZeRO):
            engine: Any = trainer.strategy.model
            filter_zero_steps(engine.optimizer, self._filter)

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        """Note the loss of a micro-batch."""
        self._filter.add_loss(loss)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count after an optimizer step; other micro-batches are skipped.

        Raises:
            RunFailedError: If too many steps in a row were skipped.
        """
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        skipped: Tensor = pl_module.step_skipped
        self._in_a_row = torch.where(skipped, self._in_a_row + skipped.long(), 0)
        seen = self._filter.seen
        if seen is None:  # DeepSpeed met an infinite gradient before it came to the norm
            seen = self._filter.observe(torch.full((), torch.inf, device=skipped.device))
        self._filter.end_step()
        reading = _Reading(torch.cat([self._in_a_row.double()[None], seen]), self._step, pl_module.tokens_seen)
        due, self._reading = (self._reading, reading) if skipped.is_cuda else (reading, None)
        if due is not None:
            self._check(trainer, due)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next steps are measured against."""
        return {**self._filter.state(), "in_a_row": int(self._in_a_row)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up."""
        self._filter.restore(state_dict)
        self._in_a_row = state_dict["in_a_row"]

    def _check(self, trainer: Trainer, reading: _Reading) -> None:
        in_a_row, loss, norm = reading.numbers()
        if in_a_row < self.end_after:
            return
        spikes = "" if self._filter.sigma is None else f", or {self._filter.sigma:g} sigma above those before"
        fail_together(
            trainer,
            f"step {reading.step}: the loss is {loss:.4g} and the norm of the gradient {norm:.4g}; {in_a_row:.0f} "
            f"steps in a row were skipped as not finite{spikes}, expected fewer than skip_steps.end_after "
            f"({self.end_after}): lower the learning rate, or look at the data before token {reading.tokens}; the same "
            "command goes on from the newest checkpoint",
        )


class _Reading:
    """Numbers on their way from the device: who reads them waits for the step that made them, and for none after it."""

    def __init__(self, numbers: Tensor, step: int, tokens: int) -> None:
        self.step, self.tokens = step, tokens
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._ready = torch.cuda.Event() if numbers.is_cuda else None
        if self._ready is not None:
            self._ready.record()

    def numbers(self) -> list[float]:
        """Return them."""
        if self._ready is not None:
            self._ready.synchronize()
        values: list[float] = self._numbers.tolist()
        return values
