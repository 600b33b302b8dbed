"""How far a rollout is from what training computes for the same tokens."""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from ds_lightning.models import DeepSeek
from ds_lightning.ops.topk_gate import Gate


class RolloutGap(NamedTuple):
    """Figures that every run with rollouts should log; scalars, on the device of what they compare."""

    max_logprob: Float[Tensor, ""]
    """Largest absolute difference of a token's log-probabilities."""
    mean_logprob: Float[Tensor, ""]
    """Mean absolute difference."""
    changed_routing: Float[Tensor, ""]
    """Share of the rollout's expert choices that training does not make; 0 where there are none."""


def rollout_gap(
    rollout: Float[Tensor, "*tokens"],
    training: Float[Tensor, "*tokens"],
    mask: Bool[Tensor, "*tokens"],
    rollout_routing: Int[Tensor, "*positions topk"] | None = None,
    training_routing: Int[Tensor, "*positions topk"] | None = None,
) -> RolloutGap:
    """Compare log-probabilities and expert choices of a rollout with those of the training forward.

    Args:
        rollout: Log-probability of each token as the rollout returned it.
        training: The same from the training forward.
        mask: Which tokens count.
        rollout_routing: Experts of each position and layer; -1: no record, which does not count.
        training_routing: Those that the training forward chooses without replay.
    """
    gap = (rollout.detach() - training.detach()).abs()[mask]
    largest = gap.max() if gap.numel() else gap.new_zeros(())
    changed = gap.new_zeros(())
    if rollout_routing is not None and training_routing is not None:
        known = rollout_routing >= 0
        same = (rollout_routing.unsqueeze(-1) == training_routing.unsqueeze(-2)).any(-1)
        changed = (known & ~same).sum() / known.sum().clamp(min=1)
    return RolloutGap(largest, gap.sum() / max(gap.numel(), 1), changed)


def training_logprobs(
    model: DeepSeek,
    input_ids: Int[Tensor, "batch seq"],
    *,
    temperature: float = 1.0,
    routing: Int[Tensor, "moe_layers batch seq topk"] | None = None,
    gates: list[Gate] | None = None,
) -> Float[Tensor, "batch seq-1"]:
    """Return the log-probability of each token but the first, by the training forward; gradient flows.

    Args:
        model: The policy.
        input_ids: Prompts and completions, padded on the right.
        temperature: Divides the logits; 0 is taken as 1, as in :class:`~ds_lightning.generation.Sample`.
        routing: Choices to replay, see :meth:`DeepSeek.forward`.
        gates: Where given, the routers' decisions are appended.
    """
    hidden = model(input_ids, gates=gates, routing=routing)
    logits = model.logits(hidden[:, :-1]).float()
    logprobs = (logits if temperature in (0, 1) else logits / temperature).log_softmax(-1)
    return logprobs.gather(-1, input_ids[:, 1:, None])[..., 0]
