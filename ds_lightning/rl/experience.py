"""What a policy learns from: sampled completions with their advantages, as padded micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ds_lightning.generation import Sample
from ds_lightning.losses.policy import Totals


class Experience(TypedDict):
    """A micro-batch: prompts, each once, and the completions of each. Column t is about a completion's token t."""

    prompt_ids: Int[Tensor, "prompts prompt_seq"]
    """Prompts, padded on the right."""
    prompt_lengths: Int[Tensor, " prompts"]
    prompt: Int[Tensor, " batch"]
    """Prompt of each completion."""
    completion_ids: Int[Tensor, "batch seq"]
    """Completions, padded on the right."""
    mask: Bool[Tensor, "batch seq"]
    """Whether there is a token to learn from."""
    advantages: Float[Tensor, " batch"]
    rollout_logprobs: Float[Tensor, "batch seq"]
    """As the sampler reported them; 0 outside of the mask."""
    prompt_routing: NotRequired[Int[Tensor, "moe_layers prompts prompt_seq topk"]]
    """Experts that the sampler took; -1 where it took none. Only in models with experts."""
    routing: NotRequired[Int[Tensor, "moe_layers batch seq topk"]]
    """The same of the completions."""
    old_logprobs: NotRequired[Float[Tensor, "batch seq"]]
    """By the training forward under the weights that sampled; only where a rollout is used for several steps."""
    ref_logprobs: NotRequired[Float[Tensor, "batch seq"]]
    """Under the reference policy; only with a KL term."""
    totals: tuple[int, int, int]
    """:class:`~ds_lightning.losses.policy.Totals` of the whole optimizer step."""
    step_tokens: int
    """Tokens of all prompts and completions of the optimizer step over all ranks, a prompt counted for each answer."""
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
    counts: bool = True
    """Whether its tokens are learned from; where not, it fills a micro-batch that would have no row."""

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt) + len(self.sample.tokens)

    def routing(self) -> tuple[Int[Tensor, "prompt moe_layers topk"], Int[Tensor, "new moe_layers topk"]]:
        """Return the experts of the prompt and of the completion."""
        assert self.sample.routing is not None, "all samples of a model record it, or none"
        return self.sample.routing[: len(self.prompt)], self.sample.routing[len(self.prompt) :]


def collate(completions: Sequence[Completion], totals: Totals, *, pad_id: int) -> Experience:
    """Return a micro-batch.

    Args:
        completions: Its rows; at least one.
        totals: What the loss of the optimizer step is divided by.
        pad_id: Token behind the end of a row.
    """
    first = dict[tuple[int, ...], Completion]()  # of each prompt
    for one in completions:
        first.setdefault(tuple(one.prompt), one)
    numbers = {prompt: number for number, prompt in enumerate(first)}
    experience = Experience(
        prompt_ids=_padded([torch.tensor(prompt) for prompt in first], pad_id),
        prompt_lengths=torch.tensor([len(prompt) for prompt in first]),
        prompt=torch.tensor([numbers[tuple(one.prompt)] for one in completions]),
        completion_ids=_padded([one.sample.tokens for one in completions], pad_id),
        mask=_padded([torch.full_like(one.sample.tokens, one.counts, dtype=torch.bool) for one in completions], 0),
        advantages=torch.tensor([completion.advantage for completion in completions]),
        rollout_logprobs=_padded([one.sample.logprobs for one in completions], 0),
        totals=(totals.sequences, totals.tokens, totals.max_tokens),
        step_tokens=sum(completion.length for completion in completions),
        step_samples=sum(completion.advantage != 0 for completion in completions),
        metrics={},
    )
    if completions[0].sample.routing is not None:
        experience["routing"] = _by_layer([one.routing()[1] for one in completions])
        experience["prompt_routing"] = _by_layer([one.routing()[0] for one in first.values()])
    return experience


def _padded(rows: Sequence[Tensor], value: float) -> Tensor:
    """Return rows of any length as one tensor."""
    return pad_sequence(list(rows), batch_first=True, padding_value=value)


def _by_layer(routing: Sequence[Int[Tensor, "seq moe_layers topk"]]) -> Int[Tensor, "moe_layers batch seq topk"]:
    """Return the experts of rows, layer by layer; -1 behind the end of a row."""
    return _padded(routing, -1).permute(2, 0, 1, 3).contiguous()
