"""Factors as functions of progress: 0 at the start of a run, 1 at its end."""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from typing import Literal


class Schedule(ABC):
    """A number that follows the progress of a run."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Return the value at a progress in [0, 1]."""


class Stairs(Schedule):
    """A value that jumps, such as DeepSeek-V3's bias update speed and its weight of multi-token prediction.

    Args:
        values: One value a stair.
        until: Progress at which each stair but the last ends, rising.

    Raises:
        ValueError: If there is not one value more than there are ends, or the ends do not rise within (0, 1).
    """

    def __init__(self, values: list[float], until: list[float]) -> None:
        if len(values) != len(until) + 1:
            raise ValueError(f"values has {len(values)} entries and until {len(until)}, expected one value more")
        if any(not 0 < end < 1 for end in until) or until != sorted(set(until)):
            raise ValueError(f"until is {until}, expected rising numbers between 0 and 1")
        self.values = values
        self.until = until

    def __call__(self, progress: float) -> float:
        """Return the value of the stair."""
        return self.values[bisect_right(self.until, progress)]


class WarmupStableDecay(Schedule):
    """A linear rise to 1, a constant stretch, and a fall to ``final``.

    Args:
        warmup: Progress at which the rise ends.
        decay: Share of the run, at its end, over which the factor falls; 1 - ``warmup``: no constant stretch.
        final: Factor at the end.
        shape: Curve of the fall.

    Raises:
        ValueError: If the parts do not fit into a run.
    """

    def __init__(
        self,
        warmup: float = 0.01,
        decay: float = 0.2,
        final: float = 0.0,
        shape: Literal["linear", "cosine"] = "linear",
    ) -> None:
        if not (warmup >= 0 and decay >= 0 and warmup + decay <= 1):
            raise ValueError(f"warmup is {warmup} and decay {decay}, expected shares of the run that sum to at most 1")
        if not 0 <= final <= 1:
            raise ValueError(f"final is {final}, expected a factor between 0 and 1")
        self.warmup = warmup
        self.decay = decay
        self.final = final
        self.shape = shape

    def __call__(self, progress: float) -> float:
        """Return the factor on the peak value."""
        if progress < self.warmup:
            return progress / self.warmup
        fallen = (progress - (1 - self.decay)) / self.decay if self.decay else 0.0
        return _fall(fallen, self.final, self.shape)


class V3Schedule(Schedule):
    """The learning rate of DeepSeek-V3 over its 14.8T tokens, as factors on the peak of 2.2e-4.

    DeepSeek-V3 (arXiv:2412.19437, section 4.2, "Training Hyper-Parameters"): a rise over 2K steps, constant to 10T
    tokens, a cosine fall to a tenth over 4.3T, that for 333B, and 7.3e-6 for the last 167B.

    Args:
        warmup: Progress at which the rise ends; 2K of the first, small batches (12.6M tokens) are 0.0017 of the run.

    Raises:
        ValueError: If the rise does not end before the fall begins.
    """

    def __init__(self, warmup: float = 0.0017) -> None:
        if not 0 <= warmup <= 10 / 14.8:
            raise ValueError(f"warmup is {warmup}, expected a share of the run from 0 to 0.6757 (10T tokens)")
        self.warmup = warmup

    def __call__(self, progress: float) -> float:
        """Return the factor on the peak learning rate."""
        trillions = 14.8 * progress
        if progress < self.warmup:
            return progress / self.warmup
        if trillions < 14.8 - 0.167:
            return _fall((trillions - 10) / 4.3, 0.1, "cosine")
        return 7.3e-6 / 2.2e-4


def _fall(fallen: float, final: float, shape: str) -> float:
    """Interpolate from 1 to ``final`` as ``fallen`` goes from 0 to 1."""
    fallen = min(max(fallen, 0.0), 1.0)
    if shape == "cosine":
        fallen = (1 - math.cos(math.pi * fallen)) / 2
    return 1 - (1 - final) * fallen
