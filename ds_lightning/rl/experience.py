"""What a policy learns from: sampled completions with their advantages, as padded micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ds_lightning.generation import Sample
from ds_lightning.losses.policy import Totals


class Experience(TypedDict):
    """A micro-batch. Position t of what has ``seq-1`` columns is about token t + 1."""

    input_ids: Int[Tensor, "batch seq"]
    """Prompt and completion, padded on the right."""
    mask: Bool[Tensor, "batch seq-1"]
    """Whether the token belongs to the completion."""
    advantages: Float[Tensor, " batch"]
    rollout_logprobs: Float[Tensor, "batch seq-1"]
    """As the sampler reported them; 0 outside of the mask."""
    routing: NotRequired[Int[Tensor, "moe_layers batch seq topk"]]
    """Experts that the sampler took; -1 where it took none. Only in models with experts."""
    old_logprobs: NotRequired[Float[Tensor, "batch seq-1"]]
    """By the training forward under the weights that sampled; only where a rollout is used for several steps."""
    ref_logprobs: NotRequired[Float[Tensor, "batch seq-1"]]
    """Under the reference policy; only with a KL term."""
    totals: tuple[int, int, int]
    """:class:`~ds_lightning.losses.policy.Totals` of the whole optimizer step."""
    step_tokens: int
    """Prompt and completion tokens of the whole optimizer step over all ranks."""
    step_samples: int
    """Completions of the whole optimizer step that have a gradient."""
    metrics: dict[str, float]
    """Of the rollout, with its first micro-batch; otherwise empty."""


@dataclass
class Completion:
    """A sample, what it answers, and how much better it is than its group."""

    prompt: Sequence[int]
    sample: Sample
    advantage: float = 0.0

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt) + len(self.sample.tokens)


def collate(completions: Sequence[Completion], totals: Totals, *, pad_id: int) -> Experience:
    """Return a micro-batch.

    Args:
        completions: Its rows; at least one.
        totals: What the loss of the optimizer step is divided by.
        pad_id: Token behind the end of a row.
    """
    rows, seq = len(completions), max(completion.length for completion in completions)
    input_ids = torch.full((rows, seq), pad_id)
    mask = torch.zeros(rows, seq - 1, dtype=torch.bool)
    logprobs = torch.zeros(rows, seq - 1)
    for row, completion in enumerate(completions):
        start, end = len(completion.prompt), completion.length
        input_ids[row, :start] = torch.tensor(completion.prompt)
        input_ids[row, start:end] = completion.sample.tokens
        mask[row, start - 1 : end - 1] = True
        logprobs[row, start - 1 : end - 1] = completion.sample.logprobs
    experience = Experience(
        input_ids=input_ids,
        mask=mask,
        advantages=torch.tensor([completion.advantage for completion in completions]),
        rollout_logprobs=logprobs,
        totals=(totals.sequences, totals.tokens, totals.max_tokens),
        step_tokens=sum(completion.length for completion in completions),
        step_samples=sum(completion.advantage != 0 for completion in completions),
        metrics={},
    )
    recorded = [completion.sample.routing for completion in completions]
    if recorded[0] is not None:
        experience["routing"] = _padded_routing(recorded, seq)
    return experience


def _padded_routing(recorded: Sequence[Tensor | None], seq: int) -> Int[Tensor, "moe_layers batch seq topk"]:
    first = recorded[0]
    assert first is not None
    padded = first.new_full((len(recorded), seq, *first.shape[1:]), -1)
    for row, routing in enumerate(recorded):
        assert routing is not None, "all samples of a model record their routing, or none"
        padded[row, : len(routing)] = routing
    return padded.permute(2, 0, 1, 3).contiguous()
