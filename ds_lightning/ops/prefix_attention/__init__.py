"""Causal attention of many rows behind prefixes that they share, such as the answers to a prompt."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ds_lightning.ops.attention import padded_attention
from ds_lightning.ops.prefix_attention import reference
from ds_lightning.ops.prefix_attention.cpu import blocked_attention

__all__ = ["prefix_attention", "reference"]


def prefix_attention(
    query: Float[Tensor, "rows heads seq qk"],
    key: Float[Tensor, "rows heads seq qk"],
    value: Float[Tensor, "rows heads seq v_dim"],
    prefix_key: Float[Tensor, "prefixes heads prefix qk"],
    prefix_value: Float[Tensor, "prefixes heads prefix v_dim"],
    prefix: Int[Tensor, " rows"],
    lengths: Int[Tensor, " prefixes"],
    *,
    scale: float,
) -> Float[Tensor, "rows heads seq v_dim"]:
    """Return what :func:`reference.prefix_attention` defines.

    On a CPU in blocks of queries, on a GPU through torch's fused attention. Keys and values of a prefix are copied
    for each of its rows, which is little beside the projections that they came from.
    """
    width, seq = prefix_key.shape[-2], query.shape[-2]
    hidden = torch.arange(width, device=query.device) >= lengths[prefix, None]  # [rows prefix]
    prefix_key, prefix_value = prefix_key.index_select(0, prefix), prefix_value.index_select(0, prefix)
    if query.device.type == "cpu":
        rows, own, values, keys_before, values_before = (
            part.flatten(0, 1) for part in (query, key, value, prefix_key, prefix_value)
        )
        hidden = hidden.repeat_interleave(query.shape[1], 0)
        out = blocked_attention(rows, own, values, keys_before, values_before, hidden, scale)
        return out.view(*query.shape[:3], -1)
    own = torch.ones(seq, seq, dtype=torch.bool, device=query.device).tril()
    seen = torch.cat((~hidden[:, None, None].expand(-1, -1, seq, -1), own.expand(len(query), 1, -1, -1)), -1)
    return padded_attention(
        query, torch.cat((prefix_key, key), -2), torch.cat((prefix_value, value), -2), seen, scale=scale
    )
