"""When the selection biases of the routers move."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class RoutingBias(Callback):
    """Moves the routing biases once an optimizer step: DeepSeek-V3 (arXiv:2412.19437, section 2.1.2).

    Stands before callbacks that read ``last_expert_load``.
    """

    def __init__(self) -> None:
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from where the run stands.

        Raises:
            ValueError: If the precision has rounded the biases: steps of a thousandth would vanish in bfloat16.
        """
        self._last_step = trainer.global_step
        for name, buffer in pl_module.named_buffers():
            if name.endswith("e_score_correction_bias") and buffer.dtype != torch.float32:
                raise ValueError(
                    f"trainer.precision is {trainer.precision}, which makes {name} {buffer.dtype}, expected "
                    "torch.float32: use bf16-mixed or 32-true"
                )

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update after an optimizer step; other micro-batches only add to the load."""
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            pl_module.step_routing_bias()
