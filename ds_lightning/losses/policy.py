"""Policy-gradient losses of the GRPO family: one function of tensors, and the papers' settings of it."""

from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

PerToken = Float[Tensor, "sequences tokens"]


class Totals(NamedTuple):
    """What a whole optimizer step holds over all ranks and micro-batches, so that their losses and means add up."""

    sequences: int
    """Completions."""
    tokens: int
    """Tokens of completions that are counted."""
    max_tokens: int
    """The most tokens that a completion may have."""


def policy_loss(
    logprobs: PerToken,
    advantages: Float[Tensor, " sequences"],
    mask: Bool[Tensor, "sequences tokens"],
    totals: Totals,
    *,
    normalise: Literal["sequence", "token", "constant"] = "sequence",
    ratio_level: Literal["token", "sequence"] = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    rollout_cap: float = 2.0,
    old_logprobs: PerToken | None = None,
    ref_logprobs: PerToken | None = None,
    rollout_logprobs: PerToken | None = None,
    entropy: PerToken | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Return this batch's share of the loss of an optimizer step, and its metrics.

    DeepSeekMath (arXiv:2402.03300, section 4.1, "Group Relative Policy Optimization"): for every token of a completion
    with advantage A and probability ratio r to the policy that sampled it,
    ``-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta k3``, where ``k3 = exp(d) - d - 1`` estimates the KL
    divergence from ``d = log p_ref - log p``. In the dtype of ``logprobs``, expected fp32 or wider. Metrics have TRL's
    names: those in ``min`` and ``max`` combine by minimum and maximum over batches, all others add up to the mean.

    Args:
        logprobs: Log-probabilities of the completions' tokens under the policy that learns, in nats.
        advantages: One a completion.
        mask: Tokens that are counted; what stands at the others has no influence.
        totals: Divisors; those of the whole step.
        normalise: Mean over tokens, then completions (``sequence``), over all tokens (``token``), or the sum divided by
            completions times ``max_tokens`` (``constant``).
        ratio_level: One ratio a token, or a completion's geometric mean.
        epsilon: How far a ratio may fall below 1 before its gradient stops; above 1 there is no such bound.
        epsilon_high: How far it may rise above 1; None: as ``epsilon``. R1 uses 10.
        delta: Upper bound of ratios whatever the sign of the advantage, above ``1 + epsilon_high``; None: none.
        beta: Weight of the KL term, which needs ``ref_logprobs``.
        rollout_cap: Upper bound of the weight that corrects for the sampler (truncated importance sampling).
        old_logprobs: Under the weights that sampled, by the training code; None: they are the same, the ratio is 1.
        ref_logprobs: Under the reference policy.
        rollout_logprobs: As the sampler reported them; given, terms are weighted by ``min(exp(old - rollout), cap)``.
        entropy: Of each token's distribution, for the metric only.

    Raises:
        ValueError: If a bound or ``beta`` is out of range, or ``beta`` has no reference.
    """
    bounds = _checked_bounds(epsilon, epsilon_high, delta, beta, rollout_cap, ref_logprobs)
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    ratio = _ratio(logprobs, old, mask, ratio_level)
    per_token, metrics = _clipped(ratio, advantages.unsqueeze(-1), mask, totals, bounds)
    if rollout_logprobs is not None:
        correction, found = _correction((old - rollout_logprobs).detach(), rollout_cap, mask, totals)
        per_token, metrics = per_token * correction, metrics | found
    if ref_logprobs is not None:
        kl = _k3((ref_logprobs - logprobs).masked_fill(~mask, 0))
        per_token, metrics["kl"] = per_token + beta * kl, kl.detach().sum() / totals.tokens
    if entropy is not None:
        metrics["entropy"] = entropy.detach().masked_fill(~mask, 0).sum() / totals.tokens
    return (per_token * _token_weights(mask.to(logprobs.dtype), totals, normalise)).sum(), metrics


grpo_loss = partial(policy_loss, normalise="sequence")
"""DeepSeekMath (arXiv:2402.03300, section 4.1) and DeepSeek-R1 (arXiv:2501.12948, section 2.1)."""

dapo_loss = partial(policy_loss, normalise="token", epsilon_high=0.28)
"""DAPO (arXiv:2503.14476, sections 3.1 "Clip-Higher" and 3.3 "Token-Level Policy Gradient Loss")."""

dr_grpo_loss = partial(policy_loss, normalise="constant")
"""Understanding R1-Zero-Like Training (arXiv:2503.20783, section 3.2); wants advantages that no deviation divides."""

gspo_loss = partial(policy_loss, normalise="sequence", ratio_level="sequence", epsilon=3e-4, epsilon_high=4e-4)
"""Group Sequence Policy Optimization (arXiv:2507.18071, sections 4.1 and 5.1)."""

VARIANTS = {"grpo": grpo_loss, "dapo": dapo_loss, "dr_grpo": dr_grpo_loss, "gspo": gspo_loss}
"""The losses by the names that configurations use."""


def _ratio(logprobs: Tensor, old: Tensor, mask: Tensor, ratio_level: str) -> Tensor:
    """Return probability ratios to the policy that sampled: one a token, or one column of them."""
    log_ratio = (logprobs - old).masked_fill(~mask, 0)
    if ratio_level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp_min(1)
    return log_ratio.exp()


def _clipped(
    ratio: Tensor, advantage: Tensor, mask: Tensor, totals: Totals, bounds: tuple[float, float, float | None]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the clipped term of each ratio, and how many were clipped."""
    low, high, delta = bounds
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    per_token = -torch.min(bounded * advantage, ratio.clamp(low, high) * advantage)
    return per_token, _clip_metrics((ratio < low) & (advantage < 0), (ratio > high) & (advantage > 0), mask, totals)


def _checked_bounds(
    epsilon: float,
    epsilon_high: float | None,
    delta: float | None,
    beta: float,
    rollout_cap: float,
    ref_logprobs: Tensor | None,
) -> tuple[float, float, float | None]:
    """Return the least and the largest ratio with a gradient, and the bound of all."""
    high = epsilon if epsilon_high is None else epsilon_high
    for name, value in (("epsilon", epsilon), ("epsilon_high", high), ("rollout_cap", rollout_cap)):
        if not value > 0:
            raise ValueError(f"{name} is {value}, expected a number above 0")
    if delta is not None and not delta > 1 + high:
        raise ValueError(f"delta is {delta}, expected more than 1 + epsilon_high = {1 + high}, or null")
    if not beta >= 0:
        raise ValueError(f"beta is {beta}, expected 0 or more")
    if beta > 0 and ref_logprobs is None:
        raise ValueError(f"beta is {beta} without a reference policy, expected ref_logprobs, or beta 0")
    return 1 - epsilon, 1 + high, delta


def _token_weights(mask: Tensor, totals: Totals, normalise: str) -> Tensor:
    if normalise == "sequence":
        return mask / (mask.sum(-1, keepdim=True).clamp_min(1) * totals.sequences)
    if normalise == "token":
        return mask / totals.tokens
    assert normalise == "constant"
    return mask / (totals.sequences * totals.max_tokens)


def _clip_metrics(low: Tensor, high: Tensor, mask: Tensor, totals: Totals) -> dict[str, Tensor]:
    """Return shares of clipped ratios; ``low`` and ``high`` have one column where a completion has one ratio."""
    counted = mask if low.shape == mask.shape else mask.any(-1, keepdim=True)
    total = totals.tokens if low.shape == mask.shape else totals.sequences
    per_sequence = counted.sum(-1).clamp_min(1)
    low, high = low & counted, high & counted
    return {
        "clip_ratio/low_mean": low.sum() / total,
        "clip_ratio/low_min": (low.sum(-1) / per_sequence).min(),
        "clip_ratio/high_mean": high.sum() / total,
        "clip_ratio/high_max": (high.sum(-1) / per_sequence).max(),
        "clip_ratio/region_mean": (low | high).sum() / total,
    }


def _k3(distance: Tensor) -> Tensor:
    return distance.exp() - distance - 1


def _correction(difference: Tensor, cap: float, mask: Tensor, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weight of truncated importance sampling of each token, and how far the sampler was off."""
    difference = difference.masked_fill(~mask, 0)
    correction = difference.exp().clamp(max=cap)
    return correction, _sampling_metrics(difference.abs(), correction, mask, totals)


def _sampling_metrics(difference: Tensor, correction: Tensor, mask: Tensor, totals: Totals) -> dict[str, Tensor]:
    return {
        "sampling/sampling_logp_difference/mean": difference.sum() / totals.tokens,
        "sampling/sampling_logp_difference/max": difference.max(),
        "sampling/importance_sampling_ratio/min": correction.masked_fill(~mask, torch.inf).min(),
        "sampling/importance_sampling_ratio/mean": correction.masked_fill(~mask, 0).sum() / totals.tokens,
        "sampling/importance_sampling_ratio/max": correction.masked_fill(~mask, 0).max(),
    }
