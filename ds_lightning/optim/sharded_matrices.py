"""Matrices in flat tensors that the ranks of a run share, as those of DeepSpeed's ZeRO."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Stretch(NamedTuple):
    """What a rank has of a parameter: elements ``first`` to before ``last``, from ``at`` on in its flat tensor."""

    first: int
    last: int
    at: int

    def where(self, first: int, last: int) -> slice:
        """Return where in the flat tensor some of these elements are."""
        return slice(self.at + first - self.first, self.at + last - self.first)


class Cut(NamedTuple):
    """How a parameter is cut into what ranks have of it.

    Its elements lie one after the other in a row of elements of which every rank has as many in succession.

    Attributes:
        numel: Elements of the parameter.
        origin: Where in the row it begins.
        shard: Elements of the row that a rank has.
        base: Where in the flat tensor of each rank its part of the row begins.
    """

    numel: int
    origin: int
    shard: int
    base: int

    def rank_of(self, element: int) -> int:
        """Return which rank has an element."""
        return (self.origin + element) // self.shard

    def on(self, rank: int) -> Stretch:
        """Return what a rank has of the parameter."""
        begin = rank * self.shard - self.origin
        first, last = (min(max(element, 0), self.numel) for element in (begin, begin + self.shard))
        return Stretch(first, last, self.base + first - begin)


class Matrices(NamedTuple):
    """Where in a flat tensor matrices of one shape lie.

    Attributes:
        whole: Stretches of matrices that are there in full.
        shared: Of each matrix that several ranks share, in one order on all ranks: the stretch that is here, perhaps an
            empty one, and the element of the matrix with which it begins.
    """

    whole: list[slice]
    shared: list[tuple[slice, int]]


class Sharding(NamedTuple):
    """How the ranks of a run share an optimizer's parameters.

    Attributes:
        contents: Of each flat tensor of this rank, the parameters that it is cut from, in order, and their shapes: all
            of them, also those of which this rank has nothing.
        rank: This one.
        ranks: Of the run.
        device: Where ranks exchange tensors; the flat ones may be elsewhere.
    """

    contents: dict[Tensor, list[tuple[Cut, tuple[int, ...]]]]
    rank: int
    ranks: int
    device: torch.device


def find_matrices(
    parameters: Iterable[tuple[Cut, tuple[int, ...]]], parts: int, rank: int
) -> dict[tuple[int, int], Matrices]:
    """Return by rows and columns where in a flat tensor the matrices of parameters lie.

    Args:
        parameters: Their cuts and shapes.
        parts: Matrices that are joined by rows in the last two dimensions of a shape.
        rank: Whose flat tensor it is.
    """
    found: dict[tuple[int, int], Matrices] = defaultdict(lambda: Matrices([], []))
    for cut, shape in parameters:
        rows, columns = shape[-2] // parts, shape[-1]
        size, here = rows * columns, cut.on(rank)
        matrices = found[rows, columns]
        begin, end = -(-here.first // size) * size, here.last // size * size
        if begin < end:
            matrices.whole.append(here.where(begin, end))
        for first in range(0, cut.numel, size):
            if cut.rank_of(first) != cut.rank_of(first + size - 1):
                begin, end = max(first, here.first), min(first + size, here.last)
                matrices.shared.append((here.where(begin, end), begin - first) if begin < end else (slice(0, 0), 0))
    return dict(found)


def gather(
    parts: list[tuple[Tensor, int]], shape: tuple[int, int], sharding: Sharding, dtype: torch.dtype
) -> Float[Tensor, "matrices rows columns"]:
    """Return those matrices in full that fall to this rank, of all that ranks share; all ranks must call it.

    Args:
        parts: Of each matrix what is here, and the element with which it begins.
        shape: Rows and columns of each.
        sharding: Who shares.
        dtype: Of the result.
    """
    whole = torch.zeros(len(parts), *shape, dtype=dtype, device=sharding.device)
    for matrix, (part, first) in zip(whole, parts, strict=True):
        matrix.view(-1)[first : first + len(part)] = part
    torch.distributed.all_reduce(whole)  # of each element one rank has it, the others 0: the sum is exact
    return whole[sharding.rank :: sharding.ranks]


def scatter(dealt: Float[Tensor, "matrices rows columns"], parts: list[tuple[Tensor, int]], sharding: Sharding) -> None:
    """Write matrices into the parts that ranks have of them; all ranks must call it.

    Args:
        dealt: Those that fell to this rank.
        parts: As for :func:`gather`, to be overwritten.
        sharding: Who shares.
    """
    whole = dealt.new_zeros(len(parts), *dealt.shape[1:])
    whole[sharding.rank :: sharding.ranks] = dealt
    torch.distributed.all_reduce(whole)
    for matrix, (part, first) in zip(whole, parts, strict=True):
        part.copy_(matrix.view(-1)[first : first + len(part)])
