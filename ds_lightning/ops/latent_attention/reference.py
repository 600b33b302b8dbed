"""Definition of attention over cached latents."""

from jaxtyping import Float
from torch import Tensor


def latent_attention(
    query: Float[Tensor, "rows heads latent"],
    cache: Float[Tensor, "rows seq latent"],
    bias: Float[Tensor, "rows seq"],
    *,
    kv_rank: int,
    scale: float,
) -> Float[Tensor, "rows heads kv_rank"]:
    """Return ``softmax(scale * query cache^T + bias)`` times the content part of the cache.

    DeepSeek-V2 (arXiv:2405.04434, section 2.1.2), after absorption: every head's key is the cached latent with its
    rotary key, every head's value the latent alone.

    Args:
        query: Queries of the newest token, content part in the latent's space, then the rotary part.
        cache: Normalised latents of ``kv_rank`` channels, then the rotary key; finite also where unused.
        bias: Added to the scores of all heads: zero, or minus infinity where nothing may be read.
        kv_rank: Width of the content part.
        scale: Factor on the scores.
    """
    scores = scale * (query @ cache.transpose(1, 2)) + bias.unsqueeze(1)
    return scores.softmax(-1) @ cache[..., :kv_rank]
