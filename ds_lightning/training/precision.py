"""Precision under DeepSpeed: what Lightning's plugin does to loss and batch, put right."""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning.pytorch.plugins.precision.deepspeed import DeepSpeedPrecision
from torch import Tensor


class StepOutcome(NamedTuple):
    """What DeepSpeed did in an optimizer step."""

    grad_norm: float
    """Global norm of the gradient before clipping; infinity where it was not finite."""
    applied: bool
    """Whether weights moved: a gradient that is not finite is skipped."""
    skipped_steps: int
    """Steps of the run that were skipped, this one included."""


class ZeROPrecision(DeepSpeedPrecision):
    """Lightning's DeepSpeed precision without its two errors.

    Both Lightning and DeepSpeed divide the loss by the number of micro-batches, so that gradients are too small by that
    factor, the norm with them, and clipping acts too late; AdamW hides the first. Here Lightning alone divides. And
    it casts all floats of a batch to the precision of the weights: advantages, weights of labels, log-probabilities of
    the sampler. Here batches stay what they are.

    DeepSpeed clips within its step, where the gradient is whole. What it did there is in ``outcome``.

    Attributes:
        outcome: Of the latest optimizer step; none before the first.

    Args:
        precision: As for ``Trainer``, such as ``bf16-mixed`` (bfloat16 weights, fp32 masters) or ``32-true``.
    """

    def __init__(self, precision: Any) -> None:
        super().__init__(precision)
        self.outcome: StepOutcome | None = None

    def convert_input(self, data: Any) -> Any:
        """Leave the batch alone."""
        return data

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Compute gradients of a loss that Lightning has already divided."""
        model.trainer.model.backward(tensor, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(  # type: ignore[override]  # as Lightning's own
        self, optimizer: Any, model: Any, closure: Any, **kwargs: Any
    ) -> Any:
        """Run the micro-batch and, if it is the last one, the step."""
        engine = model.trainer.model
        steps = engine.global_steps
        result = super().optimizer_step(optimizer, model, closure, **kwargs)
        if engine.global_steps > steps:
            applied = engine.was_step_applied()
            norm = float(engine.get_global_grad_norm()) if applied else float("inf")
            self.outcome = StepOutcome(norm, applied, engine.skipped_steps)
        return result

    def _after_closure(self, model: Any, optimizer: Any) -> None:
        """Call ``on_before_optimizer_step`` before optimizer steps alone, as in any other run."""
        if model.trainer.model.is_gradient_accumulation_boundary():
            super()._after_closure(model, optimizer)

    def _clip_gradients(self, *args: Any, **kwargs: Any) -> None:
        """Leave clipping to DeepSpeed: no rank holds a gradient whose norm would mean anything."""
