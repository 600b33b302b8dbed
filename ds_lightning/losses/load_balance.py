"""Expert load: how it is measured, and the two means that keep it even."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def expert_load(indices: Int[Tensor, "tokens topk"], num_experts: int) -> Float[Tensor, " experts"]:
    """Count the tokens routed to each expert."""
    return torch.bincount(indices.flatten(), minlength=num_experts).float()


def max_violation(load: Float[Tensor, "layers experts"]) -> Float[Tensor, " layers"]:
    """Return MaxVio of each layer: how far the fullest expert lies above the mean, ``max / mean - 1``.

    Auxiliary-Loss-Free Load Balancing (arXiv:2408.15664, section 3.1, "Metrics"). 0 is perfect balance; a layer
    without any token counts as balanced.
    """
    mean = load.mean(-1).clamp_min(torch.finfo(load.dtype).tiny)
    return (load.amax(-1) / mean - 1).clamp_min(0)


def bias_update(
    load: Float[Tensor, "*layers experts"], bias: Float[Tensor, "*layers experts"], *, gamma: float
) -> Float[Tensor, "*layers experts"]:
    """Return the selection bias after one auxiliary-loss-free balancing step.

    DeepSeek-V3 (arXiv:2412.19437, section 2.1.2, "Auxiliary-Loss-Free Load Balancing"): the bias of an overloaded
    expert falls by ``gamma``, that of an underloaded one rises by ``gamma``.

    Args:
        load: Tokens routed to each expert in the whole global batch of one optimizer step.
        bias: Current bias.
        gamma: Update speed a step; 0 leaves the bias as it is.

    Numerics: fp32; the same on every rank if ``load`` was summed over ranks first.
    """
    return bias + gamma * (load.mean(-1, keepdim=True) - load).sign()


def sequence_balance_loss(scores: Float[Tensor, "tokens experts"], topk: int, *, seq_len: int) -> Float[Tensor, ""]:
    """Return the complementary sequence-wise balance loss, summed over sequences, without its weight alpha.

    DeepSeek-V3 (arXiv:2412.19437, section 2.1.2, "Complementary Sequence-Wise Auxiliary Loss"): for each sequence the
    sum over experts of f_i P_i, where f_i is the share of tokens with expert i among their ``topk`` best *unbiased*
    scores, times experts / topk, and P_i the mean of the scores normalised over all experts.

    Args:
        scores: Affinities without bias, sequence after sequence; carry the gradient through P_i.
        topk: Experts a token.
        seq_len: Tokens a sequence.
    """
    experts = scores.shape[-1]
    per_sequence = scores.unflatten(0, (-1, seq_len))  # [batch seq experts]
    chosen = torch.zeros_like(per_sequence).scatter_(-1, per_sequence.detach().topk(topk, -1).indices, 1.0)
    frequency = chosen.mean(1) * experts / topk
    probability = (per_sequence / per_sequence.sum(-1, keepdim=True)).mean(1)
    loss: Tensor = (frequency * probability).sum()
    return loss
