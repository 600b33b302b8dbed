"""When ranks compare the weights that all of them hold."""

from typing import Any

from lightning.pytorch import Callback, Trainer

from ds_lightning.training.failure import fail_together
from ds_lightning.training.replicas import differ, fingerprints, gather, odd_ranks, replicated


class WeightCheck(Callback):
    """Ends a run whose ranks no longer hold the same weights: silent corruption of memory, or a rank that went astray.

    Compared are the bits of all parameters and buffers that every rank has in full: all with DDP and ZeRO 1 and 2, the
    buffers alone (routing biases among them) with ZeRO 3. It happens before an optimizer step, while the weights are
    those that the gradient was computed from: under ZeRO the step overwrites them from the shards, and a flipped bit
    has then done its damage unseen. What only one rank holds (shards, their optimizer states) nothing compares.

    A run of one process checks nothing.

    Args:
        every_n_steps: Optimizer steps between two checks; the first is before the first step.

    Raises:
        ValueError: If the number is below 1.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(f"weight_check.every_n_steps is {every_n_steps}, expected at least 1")
        self.every_n_steps = every_n_steps
        self._passed: int | None = None  # step of the latest check that found nothing

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Forget an earlier run of the same callback."""
        self._passed = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Check, if it is time.

        Raises:
            RunFailedError: If ranks differ.
        """
        if trainer.world_size == 1 or trainer.global_step % self.every_n_steps:
            return
        names, tensors = zip(*replicated(pl_module), strict=True)
        own = fingerprints(list(tensors))
        if differ(own):
            odd, first = odd_ranks(gather(own))
            fail_together(trainer, self._line(odd, names[first], trainer))
        self._passed = trainer.global_step

    def _line(self, odd: list[int], name: str, trainer: Trainer) -> str:
        ranks = f"rank{'s' * (len(odd) > 1)} {', '.join(map(str, odd))} of {trainer.world_size}"
        others = "one another" if len(odd) == trainer.world_size else "the others"
        since = "the start of this attempt" if self._passed is None else f"step {self._passed}"
        return (
            f"step {trainer.global_step}: {ranks} differ{'s' * (len(odd) == 1)} from {others} in the weights, first in "
            f"{name}, expected the same bits on all ranks, as at {since}: replace the device, delete checkpoints from "
            "after that, and run the same command again"
        )
