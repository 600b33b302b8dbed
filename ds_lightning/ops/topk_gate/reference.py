"""Definition of both published DeepSeek routers."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Gate(NamedTuple):
    """What a router decides for each token."""

    weights: Float[Tensor, "tokens topk"]
    """Gate values, normalised and scaled; carry the gradient."""
    indices: Int[Tensor, "tokens topk"]
    """Chosen experts, best first."""
    scores: Float[Tensor, "tokens experts"]
    """Affinity to every expert, without the selection bias."""


def topk_gate(
    logits: Float[Tensor, "tokens experts"],
    bias: Float[Tensor, " experts"] | None,
    *,
    topk: int,
    n_group: int = 1,
    topk_group: int = 1,
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid",
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    replay: Int[Tensor, "tokens topk"] | None = None,
) -> Gate:
    """Choose the experts of each token and their gate values.

    DeepSeek-V3 (arXiv:2412.19437, section 2.1.2, "Basic Architecture of DeepSeekMoE" and "Auxiliary-Loss-Free Load
    Balancing"): sigmoid affinities; the bias steers the choice of groups and experts, never a gate value; a group is
    scored by the sum of its two best. DeepSeek-V2 (arXiv:2405.04434, section 2.2): softmax affinities, no bias, a
    group is scored by its best.

    Args:
        logits: Product of token and expert centroids.
        bias: Selection bias of each expert (V3), or none (V2).
        topk: Experts a token.
        n_group: Groups that the experts are divided into, in order.
        topk_group: Groups that a token may draw from.
        scoring_func: Affinity function.
        norm_topk_prob: Divide the gate values of a token by their sum.
        routed_scaling_factor: Factor on the gate values.
        replay: Experts to take instead of choosing; -1: choose. Gate values are those of the scores at hand, so that
            the gradient flows as it does through a choice of one's own.

    Numerics: fp32 or wider. No token is dropped.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = logits.sigmoid() if scoring_func == "sigmoid" else logits.softmax(-1)
    choice = scores.detach() if bias is None else scores.detach() + bias
    if n_group > 1:
        grouped = choice.unflatten(-1, (n_group, -1))  # [tokens groups experts/groups]
        group_scores = grouped.amax(-1) if bias is None else grouped.topk(2, -1).values.sum(-1)
        allowed = torch.zeros_like(group_scores, dtype=torch.bool)
        allowed.scatter_(-1, group_scores.topk(topk_group, -1).indices, value=True)
        choice = grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(-2)
    indices = choice.topk(topk, -1).indices
    if replay is not None:
        indices = torch.where(replay < 0, indices, replay.to(indices.dtype))
    weights = scores.gather(-1, indices)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Gate(weights * routed_scaling_factor, indices, scores)
