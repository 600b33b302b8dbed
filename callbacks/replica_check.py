"""When ranks compare the weights of which each has a copy."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int64
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ds_lightning.training.failure import fail_together


class ReplicaCheck(Callback):
    """Ends a run whose ranks no longer hold the same bits where they should: a device that computes or stores wrongly.

    Every ``every_n_steps`` optimizer steps each rank adds up the bits of each of its parameters and buffers, and the
    sums are compared: one reduction of some numbers a tensor. A flipped bit in a sum's terms always changes it. It
    happens before the step, while the weights are those that the gradient came from: under ZeRO the step writes them
    anew from the shards, and a flipped bit has then done its damage unseen.

    Under ZeRO stage 3, where weights are sharded, buffers are what is left to compare. DDP copies buffers from rank 0
    in every forward, so they are alike there. What one rank alone holds (shards, the states of their optimizer)
    nothing compares.

    Args:
        every_n_steps: Optimizer steps between two comparisons; the first is before the first step.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.
        RunFailedError: In training, if they differ: the message names the first tensor that does, and the ranks on
            which it is not what it is on most.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(f"replica_check.every_n_steps is {every_n_steps}, expected at least 1")
        self.every_n_steps = every_n_steps
        self._passed: int | None = None  # step of the latest comparison in which all were alike

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier run of the same callback."""
        self._passed = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Compare, if it is time."""
        if trainer.world_size == 1 or trainer.global_step % self.every_n_steps:
            return
        names, tensors = zip(*_replicated(pl_module), strict=True)
        self._compare(trainer, list(names), torch.stack([bit_sum(tensor) for tensor in tensors]))
        self._passed = trainer.global_step

    def _compare(self, trainer: Trainer, names: list[str], sums: Tensor) -> None:
        extremes = torch.stack([sums, ~sums])  # the complement of the least is the greatest complement
        torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX)
        if torch.equal(extremes[0], ~extremes[1]):
            return
        theirs = [torch.empty_like(sums) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(theirs, sums)
        line = difference(torch.stack(theirs), names)
        since = "the start of this attempt" if self._passed is None else f"step {self._passed}"
        fail_together(
            trainer,
            f"step {trainer.global_step}: {line}: a device has computed or stored wrongly; leave its host out, delete "
            f"the checkpoints after {since}, and go on from the newest",
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
    """Return the sum of a tensor's bits, read as integers of 64 bits, modulo 2^64; a scalar on its device."""
    octets = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if octets.storage_offset() % 8:  # a piece of a larger buffer, where such integers may not begin
        octets = octets.clone()
    whole = len(octets) // 8 * 8
    return octets[:whole].view(torch.int64).sum() + octets[whole:].sum(dtype=torch.int64)


def _replicated(module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    """Yield what every rank has in full; DeepSpeed marks the parameters that it shards."""
    for name, parameter in module.named_parameters():
        if not hasattr(parameter, "ds_id"):
            yield name, parameter
    yield from module.named_buffers()
