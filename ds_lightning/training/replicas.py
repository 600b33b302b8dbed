"""Whether what every rank holds in full is the same on all of them, to the bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from jaxtyping import Int64
from torch import Tensor, nn


def replicated(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers that every rank holds in full, by name, and not what DeepSpeed has sharded."""
    for name, parameter in module.named_parameters():
        if not hasattr(parameter, "ds_id"):
            yield name, parameter
    yield from module.named_buffers()


@torch.no_grad()
def fingerprints(tensors: list[Tensor]) -> Int64[Tensor, " tensors"]:
    """Return a hash of each tensor: an exclusive or over its elements, which any one flipped bit changes."""
    return torch.stack([torch.hash_tensor(tensor.detach()).view(torch.int64) for tensor in tensors])


def differ(own: Int64[Tensor, " tensors"]) -> bool:
    """Return whether ranks differ, from one small reduction; all of them must call it."""
    highest = torch.stack([own, ~own])  # the highest complement is the complement of the lowest
    torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
    return bool((highest[0] != ~highest[1]).any())


def gather(own: Int64[Tensor, " tensors"]) -> Int64[Tensor, "ranks tensors"]:
    """Return the hashes of all ranks; all of them must call it."""
    every = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(every, own)
    return torch.stack(every).cpu()


def odd_ranks(table: Int64[Tensor, "ranks tensors"]) -> tuple[list[int], int]:
    """Return the ranks that differ, and the first tensor in which they do.

    Those that differ are all but the ones that more than half of the ranks agree with; without a majority, all.
    """
    rows = [tuple(row) for row in table.tolist()]
    common, count = Counter(rows).most_common(1)[0]
    odd = [rank for rank, row in enumerate(rows) if row != common or 2 * count <= len(rows)]
    first = next(i for i, column in enumerate(zip(*rows, strict=True)) if len(set(column)) > 1)
    return odd, first
