"""Attention of one new token a row over cached latents, as decoding with MLA needs it."""

import torch
from jaxtyping import Float
from torch import Tensor

from ds_lightning.ops.latent_attention import reference

__all__ = ["latent_attention", "reference"]


def latent_attention(
    query: Float[Tensor, "rows heads latent"],
    cache: Float[Tensor, "rows seq latent"],
    bias: Float[Tensor, "rows seq"],
    *,
    kv_rank: int,
    scale: float,
) -> Float[Tensor, "rows heads kv_rank"]:
    """Return what :func:`reference.latent_attention` defines, scale and bias as part of the first product.

    Numerics: products in the dtype of the cache, softmax in fp32 or wider. No gradient is needed.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, bias = query.to(cache.dtype), bias.to(cache.dtype)
        scores = torch.baddbmm(bias.unsqueeze(1), query, cache.transpose(1, 2), alpha=scale)
        wide = torch.promote_types(cache.dtype, torch.float32)
        return torch.bmm(scores.softmax(-1, dtype=wide).to(cache.dtype), cache[..., :kv_rank])
