"""The attention of MLA from its projections: rotary embedding, then causal attention in one of three layouts."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ds_lightning.ops.attention import causal_attention
from ds_lightning.ops.compiled import takes
from ds_lightning.ops.prefix_attention import prefix_attention
from ds_lightning.ops.rope import apply_rope
from ds_lightning.ops.rotary_attention import cpu, reference
from ds_lightning.ops.shared_prompts import SharedPrompts

__all__ = ["reference", "rotary_attention"]


def rotary_attention(
    query: Float[Tensor, "batch seq heads qk"],
    key_value: Float[Tensor, "batch seq heads nope_v"],
    k_rope: Float[Tensor, "batch seq rope"],
    cos: Float[Tensor, "seq pairs"],
    sin: Float[Tensor, "seq pairs"],
    *,
    scale: float,
    segment_ids: Int[Tensor, "batch seq"] | None = None,
    shared: SharedPrompts | None = None,
) -> Float[Tensor, "batch seq heads v_dim"]:
    """Return what :func:`reference.rotary_attention` defines.

    In a batch of one row of ``shared`` prompts, a completion attends to its prompt and to what it has itself before;
    what comes out behind the end of a prompt is finite, and of no use.

    On a CPU in fp32 all of it is one kernel, where there is a compiler; elsewhere the parts one after the other.
    """
    in_pieces = segment_ids is not None and cpu.in_pieces(segment_ids)
    if not in_pieces and takes(cpu.SOURCE, query, key_value, k_rope, cos, sin):
        return cpu.rotary_attention(query, key_value, k_rope, cos, sin, scale, segment_ids, shared)
    rope = k_rope.shape[-1]
    nope, heads = query.shape[-1] - rope, query.shape[-2]
    k_nope, value = key_value.split((nope, key_value.shape[-1] - nope), -1)
    shared_key = apply_rope(k_rope.unsqueeze(-2), cos, sin).expand(-1, -1, heads, -1)
    query = torch.cat((query[..., :nope], apply_rope(query[..., nope:], cos, sin)), -1)
    key = torch.cat((k_nope, shared_key), -1)
    if shared is not None:
        return _behind_prompts(query, key, value, shared, scale)
    by_head = (part.transpose(1, 2) for part in (query, key, value))
    return causal_attention(*by_head, scale=scale, segment_ids=segment_ids).transpose(1, 2)


def _behind_prompts(
    query: Tensor, key: Tensor, value: Tensor, shared: SharedPrompts, scale: float
) -> Float[Tensor, "1 tokens heads v_dim"]:
    """Attend within prompts, and from completions to their prompts and themselves."""
    (p_query, c_query), (p_key, c_key), (p_value, c_value) = (
        [part.transpose(1, 2) for part in shared.split(parts)] for parts in (query, key, value)
    )
    prompts = causal_attention(p_query, p_key, p_value, scale=scale)
    completions = prefix_attention(c_query, c_key, c_value, p_key, p_value, shared.prompt, shared.lengths, scale=scale)
    return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in (prompts, completions)]).unsqueeze(0)
