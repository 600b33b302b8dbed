"""When ranks compare the weights of which each has a copy."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int64
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class ReplicaCheck(Callback):
    """Ends a run whose ranks no longer hold the same bits where they should: a device that computes or stores wrongly.

    Every ``every_n_steps`` optimizer steps each rank adds up the bits of each of its parameters and buffers, and the
    sums are compared: one reduction of some numbers a tensor. Under ZeRO stage 3, where weights are sharded, buffers
    are what is left to compare. A flipped bit in a sum's terms always changes it.

    Args:
        every_n_steps: Optimizer steps between two comparisons.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.
        RuntimeError: In training, on all ranks, if they differ: the message names the first tensor that does, and the
            ranks on which it is not what it is on most.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(f"ReplicaCheck: every_n_steps is {every_n_steps}, expected at least 1")
        self.every_n_steps = every_n_steps
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting optimizer steps from where the run stands."""
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compare after every ``every_n_steps``-th optimizer step."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if trainer.world_size > 1 and trainer.global_step % self.every_n_steps == 0:
            names, tensors = zip(*_replicated(pl_module), strict=True)
            sums = torch.stack([bit_sum(tensor) for tensor in tensors])
            self._compare(trainer, list(names), sums)

    def _compare(self, trainer: Trainer, names: list[str], sums: Tensor) -> None:
        theirs = [torch.empty_like(sums) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(theirs, sums)
        line = difference(torch.stack(theirs), names)
        if line is not None:
            raise RuntimeError(
                f"step {trainer.global_step}: {line}: a device has computed or stored wrongly; leave its host out and "
                "go on from the newest checkpoint"
            )


def difference(sums: Int64[Tensor, "ranks tensors"], names: list[str]) -> str | None:
    """Return in words which tensor is not the same on all ranks, and where; none: all are.

    Args:
        sums: A number a tensor from each rank.
        names: Of the tensors.
    """
    differs = (sums != sums[0]).any(dim=0)
    if not differs.any():
        return None
    first = int(differs.nonzero()[0, 0])
    usual, count = sums[:, first].unique(return_counts=True)
    most = usual[count.argmax()]
    odd = (sums[:, first] != most).nonzero().flatten().tolist() if 2 * count.max() > len(sums) else range(len(sums))
    where = ", ".join(map(str, odd))
    return f"{names[first]} differs on ranks {where} of {len(sums)}, as do {int(differs.sum())} of {len(names)} tensors"


def bit_sum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's elements, their bits read as integers, modulo 2^64; a scalar on its device."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integers).sum(dtype=torch.int64)


def _replicated(module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    """Yield what every rank has in full; DeepSpeed marks the parameters that it shards."""
    for name, parameter in module.named_parameters():
        if not hasattr(parameter, "ds_id"):
            yield name, parameter
    yield from module.named_buffers()
