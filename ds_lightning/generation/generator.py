"""``Generator``: prompts in, samples out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ds_lightning.generation.agreement import training_logprobs
from ds_lightning.generation.engine import Engine, Record, Request
from ds_lightning.models import DeepSeek
from ds_lightning.ops.topk_gate import Gate


@dataclass(frozen=True)
class Sample:
    """One continuation of a prompt; tensors on the CPU."""

    prompt: int
    """Index of the prompt among those given."""
    tokens: Int[Tensor, " new"]
    """What was written, a stop sequence included."""
    logprobs: Float[Tensor, " new"]
    """Log-probability of each token under the softmax of logits over temperature, with nothing cut off: the policy that
    a loss with the same temperature sees. At temperature 0: that of temperature 1."""
    sampling_logprobs: Float[Tensor, " new"]
    """Log-probability with which each token was drawn: larger where ``top_k`` or ``top_p`` cut others off."""
    finish_reason: Literal["stop", "length"]
    """A stop sequence, or ``max_new_tokens``."""
    routing: Int[Tensor, "seq moe_layers topk"] | None
    """Experts of every token of prompt and continuation, as int16, best first; -1 for the last one, which was never
    fed. None: not recorded, or no experts."""


class Generator:
    """Samples from a model with a latent cache and continuous batching.

    Prompts are run once, in the form of training, and shared by their samples; after that every step feeds one token
    a row to the absorbed form of MLA. A sample's random numbers come from the seed, its prompt's key, its number
    among the prompt's samples, and its position: its tokens do not depend on what else is in the batch, unless two
    tokens lie within rounding of each other at the point that was drawn.

    The model runs in the precision that it has, or that of the autocast around the call. Afterwards it is in the mode
    that it was in; no gradient and no cache is left.

    Args:
        model: What to sample from, on any device.

    Example:
        >>> samples = Generator(model).generate([[5, 3], [7]], n=4, max_new_tokens=16, stop=[0], seed=1)
        >>> len(samples)
        8
    """

    def __init__(self, model: DeepSeek) -> None:
        self.model = model

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int = 1,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: int | Sequence[int | Sequence[int]] = (),
        seed: int = 0,
        keys: Sequence[int] | None = None,
        numbers: range | None = None,
        max_batch: int = 128,
        record_routing: bool = True,
        exact: bool = False,
        on_tokens: Callable[[list[int], list[int]], None] | None = None,
    ) -> list[Sample]:
        """Continue every prompt ``n`` times; return the samples of the first prompt, of the second, and so on.

        Args:
            prompts: Token ids.
            n: Samples a prompt.
            max_new_tokens: Tokens after which a sample ends.
            temperature: Divides the logits; 0: take the likeliest token.
            top_k: Draw from this many likeliest tokens; 0: from all.
            top_p: Draw from the likeliest tokens that together have this probability, after ``top_k``; 1: from all.
            stop: Token that ends a sample, or several, or sequences of tokens. Prompts are not searched.
            seed: Of all random numbers.
            keys: Number of each prompt that its random numbers are drawn from, with the seed; none: its index.
            numbers: Which of these samples to generate, so that processes can share those of a prompt; none: all.
            max_batch: Samples that are advanced together at most.
            record_routing: Keep the experts of every token.
            exact: Compute the returned log-probabilities and experts anew with the training forward, row by row: they
                are then bitwise what it gives for that row, at the price of one more forward.
            on_tokens: Called after every step with the numbers of the samples that were given a token, and the tokens.

        Raises:
            ValueError: If an argument is out of range, a prompt is empty, holds an id that the vocabulary lacks, or
                has no room for ``max_new_tokens`` in ``max_position_embeddings``.
        """
        request = Request(
            prompts=prompts,
            n=n,
            keys=range(len(prompts)) if keys is None else keys,
            numbers=range(len(prompts) * n) if numbers is None else numbers,
            seed=seed,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=_sequences(stop),
            max_batch=max_batch,
            record_routing=record_routing,
            on_tokens=on_tokens,
        )
        _check(request, self.model)
        with _sampling(self.model):
            samples = _samples(request, Engine(self.model, request).run())
            return [self._exactly(request, sample) for sample in samples] if exact else samples

    def _exactly(self, request: Request, sample: Sample) -> Sample:
        """Return the sample with the training forward's figures."""
        prompt, gates = request.prompts[sample.prompt], list[Gate]()
        ids = torch.tensor([[*prompt, *sample.tokens.tolist()]], device=self.model.embed_tokens.weight.device)
        logprobs = training_logprobs(self.model, ids, temperature=request.temperature, gates=gates)
        logprobs = logprobs[0, len(prompt) - 1 :].cpu()
        routing = sample.routing
        if routing is not None:
            routing = torch.stack([gate.indices for gate in gates], 1).to("cpu", torch.int16)
            routing[-1] = -1
        mass = sample.logprobs - sample.sampling_logprobs  # log of the probability that was not cut off
        return replace(sample, logprobs=logprobs, sampling_logprobs=logprobs - mass, routing=routing)


def _sequences(stop: int | Sequence[int | Sequence[int]]) -> list[Sequence[int]]:
    """Return all that ends a sample as sequences of tokens."""
    return [[part] if isinstance(part, int) else part for part in ([stop] if isinstance(stop, int) else stop)]


def _samples(request: Request, record: Record) -> list[Sample]:
    """Sort what the steps recorded by sample; within one, the order of steps is that of its tokens."""
    total = len(request.prompts) * request.n
    if not request.numbers:
        return []
    samples, tokens, logprobs, sampling_logprobs = (
        torch.cat(column).cpu() for column in zip(*record.drawn, strict=True)
    )
    order, counts = samples.argsort(stable=True), samples.bincount(minlength=total).tolist()
    columns = [column[order].split(counts) for column in (tokens, logprobs, sampling_logprobs)]
    stopped = set(torch.cat(record.stopped).tolist())
    routing: dict[int, Tensor] = {}
    if record.prompt_routing:
        routing = dict(zip(request.numbers, _routing(request, record, counts), strict=True))
    return [
        Sample(
            prompt=number // request.n,
            tokens=columns[0][number],
            logprobs=columns[1][number],
            sampling_logprobs=columns[2][number],
            finish_reason="stop" if number in stopped else "length",
            routing=routing.get(number),
        )
        for number in request.numbers
    ]


def _routing(request: Request, record: Record, counts: list[int]) -> Iterator[Tensor]:
    """Yield for each sample the experts of its prompt, of its tokens but the last, and -1 for that."""
    some = next(iter(record.prompt_routing.values()))
    chosen = [some[:0]] * len(counts)
    if record.routing:
        samples, choices = (torch.cat(column).cpu() for column in zip(*record.routing, strict=True))
        chosen = list(choices[samples.argsort(stable=True)].split([max(count - 1, 0) for count in counts]))
    unknown = torch.full_like(some[:1], -1)
    for number in request.numbers:
        yield torch.cat((record.prompt_routing[number // request.n], chosen[number], unknown))


@contextmanager
def _sampling(model: DeepSeek) -> Iterator[None]:
    """Run a model without gradient, and leave it as it was."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
        torch.clear_autocast_cache()  # it may hold weights cast without gradient, which training would find there


def _check(request: Request, model: DeepSeek) -> None:
    """Refuse what cannot be generated."""
    for name in ("n", "max_new_tokens", "max_batch"):
        if getattr(request, name) < 1:
            raise ValueError(f"{name} is {getattr(request, name)}, expected at least 1")
    if request.temperature < 0:
        raise ValueError(f"temperature is {request.temperature}, expected 0 or more")
    if request.top_k < 0:
        raise ValueError(f"top_k is {request.top_k}, expected 0 (all tokens) or more")
    if not 0 < request.top_p <= 1:
        raise ValueError(f"top_p is {request.top_p}, expected more than 0 and at most 1")
    if not all(request.stop):
        raise ValueError("stop holds an empty sequence, expected at least one token in each")
    if len(request.keys) != len(request.prompts):
        raise ValueError(f"keys has {len(request.keys)} numbers, expected {len(request.prompts)}: one a prompt")
    wanted, total = request.numbers, len(request.prompts) * request.n
    if not 0 <= wanted.start <= wanted.stop <= total or wanted.step != 1:
        raise ValueError(f"numbers is {wanted}, expected consecutive ones within the {total} samples of all prompts")
    vocab, context = model.config.vocab_size, model.config.max_position_embeddings
    for number, prompt in enumerate(request.prompts):
        if not prompt:
            raise ValueError(f"prompt {number} has no token, expected at least one")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            wrong = next(token for token in prompt if not 0 <= token < vocab)
            raise ValueError(f"prompt {number} holds the token {wrong}, expected 0 to {vocab - 1} (vocab_size {vocab})")
        if len(prompt) + request.max_new_tokens > context:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens, which with max_new_tokens ({request.max_new_tokens}) is "
                f"more than max_position_embeddings ({context}): shorten either"
            )
