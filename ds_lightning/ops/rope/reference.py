"""Definition of rotary position embedding with YaRN, in DeepSeek's interleaved layout."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ds_lightning.config import RopeScaling


def rope_frequencies(dim: int, theta: float, scaling: RopeScaling | None) -> Float[Tensor, " pairs"]:
    """Return the angle per position of each channel pair, in fp64.

    YaRN (arXiv:2309.00071, section 3.2, "NTK-by-parts"): a pair that turns more than ``beta_fast`` times over the
    original context keeps its frequency, one that turns less than ``beta_slow`` times is slowed by ``factor``, and a
    linear ramp over the pair index lies between.

    Args:
        dim: Rotary channels a head, even.
        theta: Base of the geometric sequence of frequencies.
        scaling: Context extension, or none.
    """
    exponent = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    frequency = theta**-exponent
    if scaling is None:
        return frequency

    def pair_that_turns(rotations: float) -> float:
        context = scaling.original_max_position_embeddings
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1)
    span = max(high - low, 0.001)
    slowed = ((torch.arange(dim // 2, dtype=torch.float64) - low) / span).clamp(0, 1)
    return frequency * (1 - slowed) + frequency / scaling.factor * slowed


def yarn_temperature(factor: float, mscale: float) -> float:
    """Return YaRN's attention temperature ``0.1 * mscale * ln(factor) + 1`` (arXiv:2412.19437, section 4.3)."""
    return 0.1 * mscale * math.log(factor) + 1.0


def rope_tables(
    dim: int, length: int, theta: float, scaling: RopeScaling | None
) -> tuple[Float[Tensor, "seq pairs"], Float[Tensor, "seq pairs"]]:
    """Return cosine and sine of every position and channel pair, in fp32, temperature of the rotary part included."""
    angle = torch.arange(length, dtype=torch.float64)[:, None] * rope_frequencies(dim, theta, scaling)
    amplitude = 1.0
    if scaling is not None:
        amplitude = yarn_temperature(scaling.factor, scaling.mscale) / yarn_temperature(
            scaling.factor, scaling.mscale_all_dim
        )
    return (angle.cos() * amplitude).float(), (angle.sin() * amplitude).float()


def apply_rope(
    x: Float[Tensor, "batch seq heads rope"],
    cos: Float[Tensor, "*batch seq pairs"],
    sin: Float[Tensor, "*batch seq pairs"],
) -> Float[Tensor, "batch seq heads rope"]:
    """Rotate the channel pairs (0, 1), (2, 3), ... of each head by the angle of its position."""
    wide = x.to(cos.dtype) if cos.dtype.itemsize > x.dtype.itemsize else x
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)  # [batch seq heads pairs]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)
