"""Continuous batching: samples enter the batch when there is room, advance a token a step, and leave when finished."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ds_lightning.generation.cache import LatentCache
from ds_lightning.generation.sampling import draw, mix, uniform
from ds_lightning.generation.steps import steps_of
from ds_lightning.models import DeepSeek
from ds_lightning.ops.topk_gate import Gate

PREFILL_TOKENS = 8192
"""Tokens, padding included, that one forward over prompts takes at most, unless one prompt is longer."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of one run of the engine; samples are numbered prompt by prompt."""

    prompts: Sequence[Sequence[int]]
    n: int
    keys: Sequence[int]
    numbers: range
    """Samples to generate, of all that there are."""
    seed: int
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stop: Sequence[Sequence[int]]
    max_batch: int
    record_routing: bool
    on_tokens: Callable[[list[int], list[int]], None] | None = None


class Prefilled(NamedTuple):
    """What a prompt leaves behind for the samples that continue it."""

    latents: Float[Tensor, "layers seq latent"]
    logits: Float[Tensor, " vocab"]
    routing: Int[Tensor, "seq moe_layers topk"] | None


class Rows(NamedTuple):
    """The samples in the batch, one a row."""

    sample: Int[Tensor, " rows"]
    key: Int[Tensor, " rows"]
    written: Int[Tensor, " rows"]
    """Tokens generated so far."""
    token: Int[Tensor, " rows"]
    """The newest of them."""
    recent: Int[Tensor, "rows stop"]
    """The last ones, as many as the longest stop sequence has; -1 before the first."""


@dataclass
class Record:
    """What happened, step by step; a list's items are sorted into samples at the end."""

    drawn: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Sample, token, log-probability, log-probability of the draw."""
    routing: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Sample, and the experts that its newest token took when it was fed."""
    prompt_routing: dict[int, Tensor] = field(default_factory=dict)
    stopped: list[Tensor] = field(default_factory=list)
    """Samples that ended in a stop sequence."""


class Engine:
    """One run: its batch, its cache, and the record of it."""

    def __init__(self, model: DeepSeek, request: Request) -> None:
        self.model, self.request, self.record = model, request, Record()
        self._device = model.embed_tokens.weight.device
        self._entered, self._total = request.numbers.start, request.numbers.stop
        self._width = min(request.max_batch, len(request.numbers))
        self._prefilled: dict[int, Prefilled] = {}
        self._stop = [torch.tensor(sequence, device=self._device) for sequence in request.stop]
        self._steps = steps_of(model)
        empty = torch.zeros(0, dtype=torch.long, device=self._device)
        longest = max((len(sequence) for sequence in request.stop), default=0)
        self._rows = Rows(empty, empty, empty, empty, empty.view(0, longest))
        self._cache = LatentCache(model.config, self._width, self._steps.dtype, self._device)
        self._keys = self._sample_keys()

    def run(self) -> Record:
        """Generate every sample that is asked for.

        Rows that became free wait until they are an eighth of the batch: a forward over prompts costs as much as a
        step, however few they are.
        """
        while self._entered < self._total or len(self._rows.sample):
            free = self._width - len(self._rows.sample)
            if self._entered < self._total and free >= max(1, self._width // 8):
                self._admit(free)
            else:
                self._step()
            self._retire()
        return self.record

    def _admit(self, free: int) -> None:
        """Let the next samples enter, each with its first token."""
        n = self.request.n
        samples = range(self._entered, min(self._entered + free, self._total))
        self._entered = samples.stop
        prompts = range(samples.start // n, (samples.stop - 1) // n + 1)
        self._prefill([prompt for prompt in prompts if prompt not in self._prefilled])
        logits = []
        for prompt in prompts:
            group = min((prompt + 1) * n, samples.stop) - max(prompt * n, samples.start)
            self._cache.admit(self._prefilled[prompt].latents, group)
            logits += [self._prefilled[prompt].logits] * group
        for prompt in prompts[: len(prompts) - (samples.stop % n != 0)]:
            del self._prefilled[prompt]
        sample = torch.arange(samples.start, samples.stop, device=self._device)
        zeros = torch.zeros_like(sample)
        recent = torch.full((len(sample), self._rows.recent.shape[1]), -1, device=self._device)
        entering = self._choose(Rows(sample, self._keys[sample], zeros, zeros, recent), torch.stack(logits))
        self._rows = Rows(*(torch.cat(pair) for pair in zip(self._rows, entering, strict=True)))

    def _step(self) -> None:
        """Feed the newest token of every row, and choose the next."""
        logits, chosen = self._steps(self._rows.token, self._cache)
        self._cache.advance()
        if self.request.record_routing and chosen is not None:
            self.record.routing.append((self._rows.sample, chosen))
        self._rows = self._choose(self._rows, logits)

    def _prefill(self, prompts: list[int]) -> None:
        """Run the training forward over prompts, those of similar length together."""
        tokens = self.request.prompts
        waiting = sorted(prompts, key=lambda prompt: len(tokens[prompt]))
        while waiting:
            longest = len(tokens[waiting[-1]])
            chunk = [waiting.pop() for _ in range(min(len(waiting), max(1, PREFILL_TOKENS // longest)))]
            padded = [[*tokens[prompt], *[0] * (longest - len(tokens[prompt]))] for prompt in chunk]
            self._prefill_chunk(chunk, torch.tensor(padded, device=self._device))

    def _prefill_chunk(self, prompts: list[int], ids: Int[Tensor, "batch seq"]) -> None:
        gates: list[Gate] = []
        latents: list[Tensor] = []
        hidden = self.model(ids, gates=gates, latents=latents)
        lengths = [len(self.request.prompts[prompt]) for prompt in prompts]
        logits = self.model.logits(hidden[range(len(lengths)), [length - 1 for length in lengths]])
        routing = None
        if self.request.record_routing and gates:
            chosen = torch.stack([gate.indices for gate in gates], 1).to(torch.int16)
            routing = chosen.view(*ids.shape, *chosen.shape[1:])  # [batch seq moe_layers topk]
        kept = torch.stack(latents)  # [layers batch seq latent]
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            own = None if routing is None else routing[row, :length]
            self._prefilled[prompt] = Prefilled(kept[:, row, :length], logits[row], own)
            if own is not None:
                self.record.prompt_routing[prompt] = own.cpu()

    def _choose(self, rows: Rows, logits: Float[Tensor, "rows vocab"]) -> Rows:
        """Draw a token a row and write it down."""
        request = self.request
        chance = uniform(rows.key, rows.written)
        drawn = draw(logits, chance, temperature=request.temperature, top_k=request.top_k, top_p=request.top_p)
        self.record.drawn.append((rows.sample, *drawn))
        if request.on_tokens is not None:
            request.on_tokens(rows.sample.tolist(), drawn.tokens.tolist())
        recent = torch.cat((rows.recent[:, 1:], drawn.tokens[:, None]), 1) if self._stop else rows.recent
        return Rows(rows.sample, rows.key, rows.written + 1, drawn.tokens, recent)

    def _retire(self) -> None:
        """Let finished samples leave; the last rows move to where they stood."""
        rows = self._rows
        stopped = self._stopped(rows.recent)
        finished = stopped | (rows.written >= self.request.max_new_tokens)
        if not finished.any():
            return
        self.record.stopped.append(rows.sample[stopped])
        order = torch.arange(len(finished), device=self._device)
        kept = len(finished) - int(finished.sum())
        holes, movers = order[:kept][finished[:kept]], order[kept:][~finished[kept:]]
        order[holes] = movers
        self._rows = Rows(*(values[order[:kept]] for values in rows))
        self._cache.keep(order[:kept])

    def _stopped(self, recent: Int[Tensor, "rows stop"]) -> Bool[Tensor, " rows"]:
        """Tell which rows end in a stop sequence."""
        stopped = torch.zeros(len(recent), dtype=torch.bool, device=self._device)
        for sequence in self._stop:
            stopped |= (recent[:, -len(sequence) :] == sequence).all(1)
        return stopped

    def _sample_keys(self) -> Int[Tensor, " samples"]:
        """Return the key of each sample's random numbers, from the seed, its prompt's key and its number there."""
        of_prompts = torch.tensor([_signed(key) for key in self.request.keys], dtype=torch.long, device=self._device)
        seed = torch.full_like(of_prompts, _signed(self.request.seed))
        number = torch.arange(self.request.n, device=self._device).repeat(len(of_prompts))
        return mix(mix(seed, of_prompts).repeat_interleave(self.request.n), number)


def _signed(number: int) -> int:
    """Return the lowest 64 bits as a signed number."""
    return (number + 2**63) % 2**64 - 2**63
