"""Definition of root-mean-square normalisation."""

import torch
from jaxtyping import Float
from torch import Tensor


def rms_norm(
    x: Float[Tensor, "... hidden"], weight: Float[Tensor, " hidden"], eps: float
) -> Float[Tensor, "... hidden"]:
    """Return ``x / sqrt(mean(x^2) + eps) * weight``, computed in fp32 or wider, in the dtype of ``x``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normal * weight).to(x.dtype)
