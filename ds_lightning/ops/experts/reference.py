"""Definition of the routed experts: which feed-forwards a token visits and how their outputs are mixed."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ds_lightning.ops.swiglu import swiglu


def routed_experts(
    x: Float[Tensor, "tokens hidden"],
    indices: Int[Tensor, "tokens topk"],
    weights: Float[Tensor, "tokens topk"],
    gate_up_proj: Float[Tensor, "experts two_ffn hidden"],
    down_proj: Float[Tensor, "experts hidden ffn"],
) -> Float[Tensor, "tokens hidden"]:
    """Return for each token the sum over its experts of gate value times feed-forward.

    DeepSeekMoE (arXiv:2401.06066, section 3.1). Written as the sum it is, one expert at a time over the tokens that
    chose it.

    Args:
        x: Tokens.
        indices: Experts of each token; no expert twice.
        weights: Gate values.
        gate_up_proj: Gate and up projections of every expert, gate first.
        down_proj: Down projection of every expert.
    """
    out = torch.zeros_like(x)
    for expert in range(gate_up_proj.shape[0]):
        token, slot = (indices == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up_proj[expert].T).chunk(2, -1)
        y = swiglu(gate, up) @ down_proj[expert].T * weights[token, slot].unsqueeze(-1)
        out = out.index_add(0, token, y.to(out.dtype))
    return out
