"""Which optimizer steps are better not made: those that are not finite, and those far from the ones before."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class StepFilter:
    """Decides on an optimizer step once its loss and its gradient are known, and before a weight moves.

    A step is left out where the loss or the norm of the gradient is not finite and, if asked for, where one of them is
    more than ``sigma`` standard deviations above its mean over the last ``window`` steps that were made. Steps that
    were left out are not in the window, or one spike would hide the next. Until the window is full, nothing is a spike.

    Loss and norm are averaged over ranks, so that all decide alike. Everything stays on the device, and the host does
    not wait.

    Args:
        sigma: Standard deviations; none: spikes are let through.
        window: Steps to compare with.
        mean: Averages a tensor over ranks.

    Attributes:
        seen: Loss and gradient norm of the step; none before they are known.
    """

    def __init__(self, sigma: float | None, window: int, mean: Callable[[Tensor], Tensor]) -> None:
        self.sigma = sigma
        self.mean = mean
        self.seen: Float[Tensor, " two"] | None = None
        self._loss: Tensor | float = 0.0
        self._window = torch.zeros(2, window, dtype=torch.float64)  # of losses and norms, the latest last
        self._filled = torch.zeros((), dtype=torch.int64)

    def add_loss(self, loss: Tensor) -> None:
        """Add a micro-batch's part of the loss."""
        self._loss = self._loss + loss.detach()

    def end_step(self) -> None:
        """Forget the step, whether it was decided on or not."""
        self.seen, self._loss = None, 0.0

    def observe(self, norm: Float[Tensor, ""]) -> Float[Tensor, " two"]:
        """Return loss and norm, averaged over ranks, and keep them; all ranks must call it.

        They are where the loss is: a norm may come from the host's memory, to which the GPUs' communication has no way.
        """
        loss = torch.as_tensor(self._loss, device=getattr(self._loss, "device", norm.device))
        self.seen = self.mean(torch.stack([loss.double(), norm.to(loss.device).double()]))
        return self.seen

    @torch.no_grad()
    def __call__(self, norm: Float[Tensor, ""]) -> Bool[Tensor, ""]:
        """Return whether to leave the step out.

        Args:
            norm: Of the whole gradient, before clipping.

        Numerics: fp64.
        """
        seen = self.observe(norm)
        skip = ~seen.isfinite().all()
        if self.sigma is not None:
            window, filled = self._window.to(seen.device), self._filled.to(seen.device)
            deviation, mean = torch.std_mean(window, dim=1)
            spike = (seen > mean + self.sigma * deviation).any()
            skip = skip | (spike & (filled == window.shape[1]))
            entered = torch.cat([window[:, 1:], seen[:, None]], dim=1)
            self._window = torch.where(skip, window, entered)
            self._filled = (filled + ~skip).clamp(max=window.shape[1])
        return skip

    def state(self) -> dict[str, Any]:
        """Return the window, for a checkpoint."""
        return {"window": self._window.cpu(), "filled": int(self._filled)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the window, if it is as long as this one; if not, begin anew."""
        if state["window"].shape == self._window.shape:
            self._window, self._filled = state["window"], torch.tensor(state["filled"])


def filter_zero_steps(optimizer: Any, leave_out: Callable[[Tensor], Tensor]) -> None:
    """Let DeepSpeed's optimizer ask before each step.

    It knows the norm in the middle of its step, and skips where that is not finite: of a step to be left out it is told
    that the norm is infinite.

    Args:
        optimizer: Of an engine: one of the three with which DeepSpeed 0.19 runs ZeRO.
        leave_out: Tells by the norm.
    """
    from deepspeed.runtime import utils

    if hasattr(optimizer, "_get_norm_groups"):  # stage 3
        _wrap(optimizer, "_get_norm_groups", leave_out, utils.combine_grad_norm_groups, [math.inf])
    elif hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2
        _wrap(optimizer, "scaled_global_norm", leave_out, lambda norm: norm, math.inf)
    else:  # stage 1 with bfloat16 weights
        gradients = optimizer.get_grads_for_norm

        def get_grads_for_norm(for_clipping: bool = False) -> Any:
            found = gradients(for_clipping)
            if for_clipping:
                return found
            norm = utils.get_global_norm_of_tensors(found[0], mpu=optimizer.mpu, norm_type=optimizer.norm_type)
            return ([norm.new_full((1,), math.inf)], {}) if leave_out(norm) else found

        optimizer.get_grads_for_norm = get_grads_for_norm


def _wrap(optimizer: Any, name: str, leave_out: Any, norm_of: Callable[[Any], Tensor], infinite: Any) -> None:
    """Put a question behind a method that returns the scaled norm, in some form."""
    method = getattr(optimizer, name)

    def asked() -> Any:
        found = method()
        return infinite if leave_out(norm_of(found) / optimizer.loss_scale) else found

    setattr(optimizer, name, asked)
