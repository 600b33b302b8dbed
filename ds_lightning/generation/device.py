"""Where a model runs that only writes."""

from typing import Literal

import torch

Device = Literal["cpu", "cuda"]


def check_device(device: Device) -> None:
    """Refuse a GPU where there is none.

    Raises:
        ValueError: If the device is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no CUDA device here, expected cpu")
