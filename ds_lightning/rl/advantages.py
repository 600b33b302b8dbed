"""From rewards to advantages, and which groups are worth a step."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

STD_OFFSET = 1e-4
"""Added to a standard deviation before it divides, as TRL does."""

ScaleRewards = Literal["group", "batch", "none"]


def group_advantages(
    rewards: Float[Tensor, " samples"], group_size: int, *, scale_rewards: ScaleRewards = "group"
) -> tuple[Float[Tensor, " samples"], dict[str, Tensor]]:
    """Return how much better each sample is than its group, and metrics under the names that TRL gives them.

    DeepSeekMath (arXiv:2402.03300, section 4.1.2, "Outcome Supervision RL with GRPO"): ``(r - mean) / std`` over the
    samples of one prompt, here with the unbiased deviation plus ``STD_OFFSET``.

    Args:
        rewards: Group after group; NaN where no reward applies: such a sample is left out of its group's mean and
            deviation, and gets the advantage 0.
        group_size: Samples a prompt.
        scale_rewards: Deviation that divides: of the ``group``, of the whole ``batch``, or ``none`` (Dr.GRPO,
            arXiv:2503.20783, section 3.2).

    Raises:
        ValueError: If the samples do not make whole groups.
    """
    groups = _grouped(rewards, group_size)
    deviation = _nanstd(groups)
    advantages = groups - groups.nanmean(-1, keepdim=True)
    if scale_rewards == "group":
        advantages = advantages / (deviation + STD_OFFSET)
    elif scale_rewards == "batch":
        advantages = advantages / (_nanstd(rewards) + STD_OFFSET)
    metrics = {
        "reward": rewards.nanmean(),
        "reward_std": deviation.mean(),
        "frac_reward_zero_std": 1 - useful_groups(rewards, group_size).to(rewards.dtype).mean(),
    }
    return advantages.nan_to_num(nan=0.0).flatten(), metrics


def useful_groups(rewards: Float[Tensor, " samples"], group_size: int) -> Bool[Tensor, " groups"]:
    """Return which groups have rewards that differ: the others give no gradient.

    DAPO (arXiv:2503.14476, section 3.2, "Dynamic Sampling") samples on until a batch is full of such groups.

    Raises:
        ValueError: If the samples do not make whole groups.
    """
    groups = _grouped(rewards, group_size)
    highest = groups.nan_to_num(nan=-torch.inf).amax(-1)
    return highest > groups.nan_to_num(nan=torch.inf).amin(-1)


def overlong_penalty(
    lengths: Int[Tensor, " samples"], *, max_tokens: int, cache_tokens: int
) -> Float[Tensor, " samples"]:
    """Return 0 for a completion that is short enough, down to -1 for one that uses up ``max_tokens``.

    DAPO (arXiv:2503.14476, section 3.4, "Overlong Reward Shaping", equation of the soft punishment).

    Args:
        lengths: Tokens of each completion.
        max_tokens: From here on the penalty is -1.
        cache_tokens: The last ones of ``max_tokens``, over which the penalty grows evenly.

    Raises:
        ValueError: If the last tokens are none, or more than all.
    """
    if not 0 < cache_tokens <= max_tokens:
        raise ValueError(f"cache_tokens is {cache_tokens}, expected between 1 and max_tokens = {max_tokens}")
    return ((max_tokens - cache_tokens - lengths) / cache_tokens).clamp(-1, 0)


def _grouped(rewards: Tensor, group_size: int) -> Tensor:
    if group_size < 1 or not len(rewards) or len(rewards) % group_size:
        raise ValueError(
            f"{len(rewards)} rewards in groups of {group_size}, expected a positive multiple: the samples of a prompt "
            "stand together"
        )
    groups: Tensor = rewards.unflatten(0, (-1, group_size))
    return groups


def _nanstd(values: Tensor) -> Tensor:
    """Return the unbiased deviation along the last dimension, 0 where there are fewer than two values."""
    count = (~values.isnan()).sum(-1, keepdim=True)
    squares = (values - values.nanmean(-1, keepdim=True)).square().nansum(-1, keepdim=True)
    return (squares / (count - 1).clamp_min(1)).sqrt()
