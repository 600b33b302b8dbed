"""The tolerance of low precision: an operation may be 1.5 times as far from the truth as its plain definition."""

from __future__ import annotations

import torch
from torch import Tensor

ALLOWED = 1.5


def relative_error(value: Tensor, truth: Tensor) -> float:
    assert value.shape == truth.shape
    assert value.isfinite().all()
    return float((value.double() - truth).norm() / truth.norm())


def assert_as_close_as_plain(name: str, fast: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Compare an operation and its plain definition, both in low precision, with the definition in fp64."""
    assert truth.dtype == torch.float64
    assert truth.norm() > 0, f"{name}: an all-zero truth proves nothing"
    floor = relative_error(plain, truth)
    assert floor > 1e-4, f"{name}: the plain definition did not run in low precision"
    ratio = relative_error(fast, truth) / floor
    print(f"{name}: {ratio:.3f} of the plain error {floor:.2e}")
    assert ratio <= ALLOWED, f"{name}: {ratio:.3f} times the error of the plain definition"
