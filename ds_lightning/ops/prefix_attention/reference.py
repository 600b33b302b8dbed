"""Definition of causal attention of many rows behind prefixes that they share."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


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
    """Return causal attention over a row's prefix and, behind it, the row itself.

    Args:
        query: Queries.
        key: Keys.
        value: Values; their width may differ from that of the keys.
        prefix_key: Keys of the prefixes, padded on the right.
        prefix_value: Their values; finite also where padded.
        prefix: Prefix of each row.
        lengths: Positions of each prefix.
        scale: Factor on the scores.
    """
    seq, width = query.shape[-2], prefix_key.shape[-2]
    before = torch.arange(width, device=query.device) < lengths[prefix, None, None, None]  # [rows 1 1 prefix]
    own = torch.ones(seq, seq, dtype=torch.bool, device=query.device).tril()
    allowed = torch.cat((before.expand(-1, -1, seq, -1), own.expand(len(query), 1, -1, -1)), -1)
    scores = query @ torch.cat((prefix_key[prefix], key), -2).transpose(-1, -2) * scale
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ torch.cat((prefix_value[prefix], value), -2)
