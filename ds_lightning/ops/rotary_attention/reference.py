"""Definition of the attention of MLA: rotary embedding, then causal attention."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ds_lightning.ops.attention.reference import causal_attention
from ds_lightning.ops.rope.reference import apply_rope


def rotary_attention(
    query: Float[Tensor, "batch seq heads qk"],
    key_value: Float[Tensor, "batch seq heads nope_v"],
    k_rope: Float[Tensor, "batch seq rope"],
    cos: Float[Tensor, "seq pairs"],
    sin: Float[Tensor, "seq pairs"],
    *,
    scale: float,
    segment_ids: Int[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch seq heads v_dim"]:
    """Return causal attention with a key part that all heads share.

    DeepSeek-V2 (arXiv:2405.04434, section 2.1.3, "Decoupled Rotary Position Embedding").

    Args:
        query: Content part, then position part, not rotated.
        key_value: Content part of the keys, then the values.
        k_rope: Position part of the keys, not rotated, the same for every head.
        cos: Rotary table.
        sin: The same.
        scale: Factor on the scores.
        segment_ids: Document of each position; attention stays within a document. None: the whole row.
    """
    nope = query.shape[-1] - k_rope.shape[-1]
    shared = apply_rope(k_rope.unsqueeze(-2), cos, sin).expand(*query.shape[:3], -1)
    rotated = torch.cat((query[..., :nope], apply_rope(query[..., nope:], cos, sin)), -1)
    key = torch.cat((key_value[..., :nope], shared), -1)
    value = key_value[..., nope:]
    by_head = (part.transpose(1, 2) for part in (rotated, key, value))
    return causal_attention(*by_head, scale=scale, segment_ids=segment_ids).transpose(1, 2)
