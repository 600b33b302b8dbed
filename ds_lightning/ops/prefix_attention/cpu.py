"""Attention behind a prefix on a CPU: batched products over blocks of queries, which skip keys that none may see."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ds_lightning.ops.attention.cpu import query_blocks


class _PrefixAttention(torch.autograd.Function):
    """Keeps queries, keys and values; probabilities are made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        hidden: Tensor,
        scale: float,
    ) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        for start, stop in query_blocks(query):
            before, own = _probability(query, key, prefix_key, hidden, scale, start, stop)
            torch.baddbmm(before @ prefix_value, own, value[:, :stop], out=out[:, start:stop])
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, hidden)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, prefix_key, prefix_value, hidden = ctx.saved_tensors
        width = prefix_key.shape[1]
        grad_query = torch.empty_like(query)
        grad_key, grad_value, grad_prefix_key, grad_prefix_value = map(
            torch.zeros_like, (key, value, prefix_key, prefix_value)
        )
        for start, stop in query_blocks(query):
            grad, queries = grads[0][:, start:stop], query[:, start:stop]
            before, own = _probability(query, key, prefix_key, hidden, ctx.scale, start, stop)
            grad_prefix_value.baddbmm_(before.transpose(1, 2), grad)
            grad_value[:, :stop] += own.transpose(1, 2) @ grad
            grad_probability = torch.cat(
                (grad @ prefix_value.transpose(1, 2), grad @ value[:, :stop].transpose(1, 2)), -1
            )
            probability = torch.cat((before, own), -1)
            grad_score = torch._softmax_backward_data(grad_probability, probability, -1, probability.dtype)
            before, own = grad_score.mul_(ctx.scale).split((width, stop), -1)
            torch.baddbmm(before @ prefix_key, own, key[:, :stop], out=grad_query[:, start:stop])
            grad_prefix_key.baddbmm_(before.transpose(1, 2), queries)
            grad_key[:, :stop] += own.transpose(1, 2) @ queries
        return grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value, None, None


def blocked_attention(
    query: Float[Tensor, "rows seq qk"],
    key: Float[Tensor, "rows seq qk"],
    value: Float[Tensor, "rows seq v_dim"],
    prefix_key: Float[Tensor, "rows prefix qk"],
    prefix_value: Float[Tensor, "rows prefix v_dim"],
    hidden: Bool[Tensor, "rows prefix"],
    scale: float,
) -> Float[Tensor, "rows seq v_dim"]:
    """Return causal attention behind a prefix, a row being one head of one sequence.

    See :func:`reference.prefix_attention`; ``hidden`` are the positions behind the end of a row's prefix.
    """
    with torch.autocast(query.device.type, enabled=False):
        out: Tensor = _PrefixAttention.apply(query, key, value, prefix_key, prefix_value, hidden, scale)  # type: ignore[no-untyped-call]
    return out


def _probability(
    query: Tensor, key: Tensor, prefix_key: Tensor, hidden: Tensor, scale: float, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Return the attention of a block of queries, over the prefix and over the keys up to its last query."""
    queries, width = query[:, start:stop], prefix_key.shape[1]
    score = torch.cat((queries @ prefix_key.transpose(1, 2), queries @ key[:, :stop].transpose(1, 2)), -1).mul_(scale)
    score[:, :, :width].masked_fill_(hidden.unsqueeze(1), -torch.inf)
    later = torch.ones(stop - start, stop - start, dtype=torch.bool, device=query.device).triu(1)
    score[:, :, width + start :].masked_fill_(later, -torch.inf)
    before, own = score.softmax(-1).split((width, stop), -1)
    return before, own
