"""Definition of causal attention with value heads of their own width."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def causal_attention(
    query: Float[Tensor, "batch heads seq qk"],
    key: Float[Tensor, "batch heads seq qk"],
    value: Float[Tensor, "batch heads seq v_dim"],
    *,
    scale: float,
    segment_ids: Int[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch heads seq v_dim"]:
    """Return ``softmax(scale * query key^T) value`` over the positions at or before each query's own.

    Args:
        query: Queries.
        key: Keys.
        value: Values; their width may differ from that of the keys.
        scale: Factor on the scores.
        segment_ids: Document of each position; attention stays within a document. None: the whole row.
    """
    seq = query.shape[-2]
    allowed = torch.ones(seq, seq, dtype=torch.bool, device=query.device).tril()
    if segment_ids is not None:
        allowed = allowed & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ value
