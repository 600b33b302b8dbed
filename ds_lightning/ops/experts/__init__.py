"""The routed experts: sorted by expert for training, all at once for the few tokens of a decoding step."""

from jaxtyping import Float, Int
from torch import Tensor

from ds_lightning.ops.compiled import takes
from ds_lightning.ops.experts import cpu, grouped, reference
from ds_lightning.ops.experts.few import few_tokens

__all__ = ["few_tokens", "reference", "routed_experts"]


def routed_experts(
    x: Float[Tensor, "tokens hidden"],
    indices: Int[Tensor, "tokens topk"],
    weights: Float[Tensor, "tokens topk"],
    gate_up_proj: Float[Tensor, "experts two_ffn hidden"],
    down_proj: Float[Tensor, "experts hidden ffn"],
) -> Float[Tensor, "tokens hidden"]:
    """Return what :func:`reference.routed_experts` defines; on a CPU in fp32 by a kernel, where there is a compiler.

    Rows are sorted by expert once; every product then runs over contiguous rows, and gate values enter before the
    down projection, so that its output is summed as it is. An expert without tokens costs nothing.

    Numerics: products run in the autocast dtype where autocast is on, else in the dtype of ``x``; sums over a token's
    experts and all gradients of weights are rounded once. Deterministic.
    """
    if takes(cpu.SOURCE, x, weights, gate_up_proj, down_proj):
        return cpu.routed_experts(x, indices, weights, gate_up_proj, down_proj)
    return grouped.routed_experts(x, indices, weights, gate_up_proj, down_proj)
