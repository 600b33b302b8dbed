"""Random numbers that belong to a sample, and the choice of a token with them: pure functions of tensors."""

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ds_lightning.ops.compiled import compiled, takes, threads_for

KERNELS = Path(__file__).with_name("decode.cpp")
"""Decoding steps, and the draw where nothing is cut off."""


class Drawn(NamedTuple):
    """The next token of each row."""

    tokens: Int[Tensor, " rows"]
    logprobs: Float[Tensor, " rows"]
    """Log-probability under the softmax of logits over temperature, nothing cut off."""
    sampling_logprobs: Float[Tensor, " rows"]
    """Log-probability with which the token was drawn: the same, unless ``top_k`` or ``top_p`` cut tokens off."""


def mix(key: Int[Tensor, " rows"], counter: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """Hash a key and a counter to 64 bits, with the finaliser of SplitMix64 (doi:10.1145/2714064.2660195)."""
    z = key + (counter + 1) * -0x61C8864680B583EB  # 2^64 over the golden ratio, in two's complement
    z = (z ^ _shifted(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ _shifted(z, 27)) * -0x6B2FB644ECCEEE15
    return z ^ _shifted(z, 31)


def uniform(key: Int[Tensor, " rows"], counter: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Return a number in [0, 1) of 24 bits for each key and counter: no state, and no row depends on another."""
    return _shifted(mix(key, counter), 40).to(torch.float32) * 2.0**-24


def draw(
    logits: Float[Tensor, "rows vocab"],
    chance: Float[Tensor, " rows"],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Drawn:
    """Choose a token a row: the first one, in the order of ids, at which the summed probability exceeds ``chance``.

    Args:
        logits: Scores of the vocabulary.
        chance: A uniform random number a row, from :func:`uniform`.
        temperature: Divides the logits; 0 takes the likeliest token, with the probabilities of temperature 1.
        top_k: Draw from this many likeliest tokens; 0: from all. Tokens as likely as the last of them are kept too.
        top_p: Draw from the likeliest tokens that together have this probability, after ``top_k``; 1: from all.
    """
    if temperature > 0 and not top_k and top_p == 1 and takes(KERNELS, logits, chance):
        return _draw_from_all(logits.contiguous(), chance.contiguous(), temperature)
    logprobs, kept = distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
        kept = None
    else:
        probability = logprobs.exp() if kept is None else logprobs.exp().masked_fill_(~kept, 0.0)
        summed = probability.cumsum(-1)
        # chance has 24 bits, so the product rounds to less than the sum: a token is found, of probability above zero
        tokens = torch.searchsorted(summed, chance[:, None] * summed[:, -1:], right=True)
    chosen = logprobs.gather(-1, tokens)[:, 0]
    return Drawn(tokens[:, 0], chosen, chosen if kept is None else chosen - kept_mass(logprobs, kept))


def _draw_from_all(logits: Tensor, chance: Tensor, temperature: float) -> Drawn:
    library = compiled(KERNELS)
    assert library is not None, "who asks takes() first"
    rows, vocab = logits.shape
    tokens, logprobs = torch.empty(rows, dtype=torch.long), torch.empty(rows)
    sizes = ctypes.c_int64(rows), ctypes.c_int64(vocab), ctypes.c_float(temperature)
    inputs, outputs = ([ctypes.c_void_p(x.data_ptr()) for x in pair] for pair in ((logits, chance), (tokens, logprobs)))
    library.draw(*inputs, *sizes, *outputs, threads_for(8 * logits.numel()))
    return Drawn(tokens, logprobs, logprobs)


def distribution(
    logits: Float[Tensor, "rows vocab"], *, temperature: float, top_k: int, top_p: float
) -> tuple[Float[Tensor, "rows vocab"], Bool[Tensor, "rows vocab"] | None]:
    """Return the log-probability of every token with nothing cut off, and which may be drawn; none: all."""
    logits = logits.float()
    logprobs = (logits if temperature in (0, 1) else logits / temperature).log_softmax(-1)
    left, kept = logprobs, None
    if 0 < top_k < logits.shape[-1]:
        kept = logprobs >= logprobs.topk(top_k, -1).values[:, -1:]
        left = logprobs.masked_fill(~kept, -torch.inf)
    if top_p < 1:
        ordered = left.sort(-1, descending=True).values
        likelier = ordered.softmax(-1).cumsum(-1).roll(1, -1)  # probability of all tokens before this one
        likelier[:, 0] = 0.0
        last = (likelier < top_p).sum(-1, keepdim=True) - 1
        kept = (left >= ordered.gather(-1, last)) & (left > -torch.inf)
    return logprobs, kept


def kept_mass(logprobs: Float[Tensor, "rows vocab"], kept: Bool[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """Return the log of the probability of all tokens that may be drawn."""
    return logprobs.masked_fill(~kept, -torch.inf).logsumexp(-1)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift right as an unsigned number."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
