"""What ranks tell one another: the parts of something that they make together, or that one of them cannot."""

import io
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer

from ds_lightning.training.failure import fail_together
from ds_lightning.user_errors import RunFailedError

Part = TypeVar("Part")


def from_all_ranks(trainer: Trainer, make: Callable[[], Part]) -> list[Part]:
    """Make this rank's part of something, and return the parts of all ranks in their order.

    All ranks leave together. An error on one ends the run on all: the others would wait for it where it never comes.
    Parts go round one after another, so that a device holds one of them at a time.

    Args:
        trainer: Of the run; all its ranks must call this at the same point.
        make: Makes a part, anything that ``torch.save`` takes.

    Raises:
        ValueError: If a rank's part cannot be made for a reason that the user can change; said by rank 0 alone.
        RunFailedError: If it fails for another reason, whose traceback that rank prints.
        SystemExit: On other ranks than 0 in both cases.
    """
    if trainer.world_size == 1:
        return [make()]
    packed, failure = io.BytesIO(), None
    try:
        torch.save(make(), packed)
    except (OSError, RuntimeError, ValueError) as error:
        failure = str(error), isinstance(error, ValueError)
        if not isinstance(error, ValueError):
            traceback.print_exc()
    reports: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(reports, (failure, len(packed.getbuffer())))
    for rank, (failed, _) in enumerate(reports):
        if failed is not None:
            message, wrong_input = failed
            fail_together(trainer, f"rank {rank}: {message}", ValueError if wrong_input else RunFailedError)
    return [_sent(trainer, rank, packed, size) for rank, (_, size) in enumerate(reports)]


def _sent(trainer: Trainer, rank: int, packed: io.BytesIO, size: int) -> Any:
    """Return the part of one rank, which it sends to all."""
    device = trainer.strategy.root_device
    if rank == trainer.global_rank:
        content = torch.frombuffer(packed.getbuffer(), dtype=torch.uint8).to(device)
    else:
        content = torch.empty(size, dtype=torch.uint8, device=device)
    torch.distributed.broadcast(content, src=rank)
    # What another rank of this run has just packed may be unpickled.
    return torch.load(io.BytesIO(content.cpu().numpy().tobytes()), map_location="cpu", weights_only=False)
