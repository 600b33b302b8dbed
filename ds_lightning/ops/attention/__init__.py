"""Causal attention with query and key heads wider than value heads, as MLA needs it."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ds_lightning.ops.attention import reference
from ds_lightning.ops.attention.cpu import blocked_attention

__all__ = ["causal_attention", "padded_attention", "reference"]


def causal_attention(
    query: Float[Tensor, "batch heads seq qk"],
    key: Float[Tensor, "batch heads seq qk"],
    value: Float[Tensor, "batch heads seq v_dim"],
    *,
    scale: float,
    segment_ids: Int[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch heads seq v_dim"]:
    """Return what :func:`reference.causal_attention` defines.

    On a CPU in blocks of queries, on a GPU through :func:`padded_attention`.
    """
    if query.device.type == "cpu":
        segments = None if segment_ids is None else segment_ids.repeat_interleave(query.shape[1], 0)
        rows = blocked_attention(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), segments, scale)
        return rows.view(*query.shape[:3], -1)
    mask = None
    if segment_ids is not None:
        seq = query.shape[-2]
        causal = torch.ones(seq, seq, dtype=torch.bool, device=query.device).tril()
        mask = causal & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return padded_attention(query, key, value, mask, scale=scale)


def padded_attention(
    query: Float[Tensor, "batch heads seq qk"],
    key: Float[Tensor, "batch heads keys qk"],
    value: Float[Tensor, "batch heads keys v_dim"],
    mask: Bool[Tensor, "batch 1 seq keys"] | None,
    *,
    scale: float,
) -> Float[Tensor, "batch heads seq v_dim"]:
    """Return attention by torch's fused kernels where the mask is true, or without one, causal attention.

    The kernels want all heads of one width: the narrower side is padded with zeros, which changes no score and no
    value, and the padding is cut off again.
    """
    qk, v_dim = query.shape[-1], value.shape[-1]
    if qk < v_dim:
        query, key = pad(query, (0, v_dim - qk)), pad(key, (0, v_dim - qk))
    elif v_dim < qk:
        value = pad(value, (0, qk - v_dim))
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[..., :v_dim]
