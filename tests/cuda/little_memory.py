"""A callback that leaves a run little of the GPU's memory."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer


class LittleMemory(Callback):
    """Lets the process allocate no more than so many bytes.

    Args:
        limit: Bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Set the limit."""
        whole = torch.cuda.get_device_properties(pl_module.device).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(self.limit / whole, pl_module.device)
