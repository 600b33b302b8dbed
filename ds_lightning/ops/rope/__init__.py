"""Rotary position embedding (arXiv:2104.09864) with YaRN context extension."""

import torch
from jaxtyping import Float
from torch import Tensor

from ds_lightning.ops.rope import reference
from ds_lightning.ops.rope.reference import rope_frequencies, rope_tables, yarn_temperature

__all__ = ["apply_rope", "reference", "rope_frequencies", "rope_tables", "yarn_temperature"]


def apply_rope(
    x: Float[Tensor, "batch seq heads rope"],
    cos: Float[Tensor, "*batch seq pairs"],
    sin: Float[Tensor, "*batch seq pairs"],
) -> Float[Tensor, "batch seq heads rope"]:
    """Return what :func:`reference.apply_rope` defines, as one product of complex numbers in fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    turned = torch.complex(wide[..., 0::2], wide[..., 1::2]) * torch.complex(cos, sin).unsqueeze(-2)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
