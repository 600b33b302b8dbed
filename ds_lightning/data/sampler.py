"""Which rows an optimizer step sees: a pure function of the seed and the tokens consumed before it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

FEISTEL_ROUNDS = 6


def permute(index: Int64[np.ndarray, " rows"], size: int, *, seed: int, epoch: int) -> Int64[np.ndarray, " rows"]:
    """Return where a pseudo-random permutation of ``range(size)`` sends each index, without holding the permutation.

    A Feistel network permutes the smallest square power of two that holds ``size``; an image outside ``range(size)``
    is sent through it again until it is inside (cycle walking), which leaves a permutation of ``range(size)``.

    Args:
        index: Numbers in ``range(size)``.
        size: Size of the permuted range, at least 1.
        seed: Together with the epoch, the key of the permutation.
        epoch: Pass over the range, from 0.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    image = _feistel(index.astype(np.uint64), half, seed, epoch)
    while len(outside := np.flatnonzero(image >= size)):
        image[outside] = _feistel(image[outside], half, seed, epoch)
    return image.astype(np.int64)


def _feistel(value: UInt64[np.ndarray, " rows"], half: np.uint64, seed: int, epoch: int) -> UInt64[np.ndarray, " rows"]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    keys = np.random.SeedSequence([seed, epoch]).generate_state(FEISTEL_ROUNDS, dtype=np.uint64)
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    image: np.ndarray = (left << half) | right
    return image


def _mix(value: UInt64[np.ndarray, " rows"]) -> UInt64[np.ndarray, " rows"]:
    """Return a hash of each number (the finalizer of SplitMix64)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = value ^ (value >> np.uint64(31))
    return mixed


def row_order(size: int, start: int, count: int, *, seed: int) -> Int64[np.ndarray, " rows"]:
    """Return the rows at positions ``start`` to before ``start + count`` of the endless training order.

    Each run of ``size`` positions from a multiple of ``size`` is an epoch with a permutation of its own.
    """
    positions = np.arange(start, start + count, dtype=np.int64)
    epochs = positions // size
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        rows[here] = permute(positions[here] - epoch * size, size, seed=seed, epoch=epoch)
    return rows


@dataclass(frozen=True)
class BatchSchedule:
    """Rows of a global optimizer step as a function of the tokens consumed before it.

    DeepSeek-V3 (arXiv:2412.19437, section 4.2) grows the batch from 3072 to 15360 sequences over the first 469B
    tokens. The growth is linear, in stairs of ``multiple`` rows. The ranks and the accumulation share the rows of a
    step, so ``multiple`` must be a multiple of their product: the micro-batches grow, their number stays.

    Raises:
        ValueError: If the numbers contradict each other.
    """

    batch_size: int
    """Rows of a step after the ramp."""
    ramp_tokens: int = 0
    """Tokens over which the batch grows; 0: no ramp."""
    start_batch_size: int | None = None
    """Rows of the first step; none: ``batch_size``."""
    multiple: int = 1
    """Height of a stair in rows."""

    def __post_init__(self) -> None:
        """Refuse a ramp that is none."""
        if self.batch_size < 1 or self.multiple < 1:
            raise ValueError(f"batch_size is {self.batch_size} and ramp_multiple {self.multiple}, expected at least 1")
        if self.ramp_tokens < 0:
            raise ValueError(f"ramp_tokens is {self.ramp_tokens}, expected 0 (no ramp) or more")
        if (self.ramp_tokens > 0) != (self.start_batch_size is not None):
            raise ValueError(
                f"ramp_tokens is {self.ramp_tokens} and start_batch_size {self.start_batch_size}, expected both or none"
            )
        if not 1 <= self.first <= self.batch_size:
            raise ValueError(f"start_batch_size is {self.first}, expected 1 to batch_size ({self.batch_size})")
        for name, value in (("batch_size", self.batch_size), ("start_batch_size", self.first)):
            if value % self.multiple:
                raise ValueError(f"{name} is {value}, expected a multiple of ramp_multiple ({self.multiple})")

    @property
    def first(self) -> int:
        """Rows of the first step."""
        return self.batch_size if self.start_batch_size is None else self.start_batch_size

    def rows(self, tokens_seen: int) -> int:
        """Return the rows of the step that begins after ``tokens_seen`` tokens."""
        if tokens_seen >= self.ramp_tokens:
            return self.batch_size
        return self.first + self.multiple * (self.stairs * tokens_seen // self.ramp_tokens)

    def stair_end(self, tokens_seen: int) -> int:
        """Return the least number of tokens at which a step sees more rows than after ``tokens_seen`` in the ramp."""
        climbed = (self.rows(tokens_seen) - self.first) // self.multiple
        return -(-(climbed + 1) * self.ramp_tokens // self.stairs)

    @property
    def stairs(self) -> int:
        """How often the batch grows."""
        return (self.batch_size - self.first) // self.multiple


class Step(NamedTuple):
    """A global optimizer step."""

    tokens_before: int
    rows: int


class _Stair(NamedTuple):
    """Steps in succession that see equally many rows."""

    first_step: int
    tokens_before: int
    rows: int


class StepPlan:
    """The steps of a run: where each begins and how many rows it sees.

    Args:
        schedule: Rows of a step.
        seq_len: Tokens of a row.
        total_tokens: Planned tokens; the last step is the first that reaches them.

    Raises:
        ValueError: If ``total_tokens`` is not positive.
    """

    def __init__(self, schedule: BatchSchedule, seq_len: int, total_tokens: int) -> None:
        if total_tokens < 1:
            raise ValueError(f"total_tokens is {total_tokens}, expected at least 1")
        self.schedule = schedule
        self.seq_len = seq_len
        self.total_tokens = total_tokens
        self._stairs = [_Stair(0, 0, schedule.rows(0))]
        while (last := self._stairs[-1]).rows < schedule.batch_size:
            steps = -(-(schedule.stair_end(last.tokens_before) - last.tokens_before) // (last.rows * seq_len))
            tokens = last.tokens_before + steps * last.rows * seq_len
            self._stairs.append(_Stair(last.first_step + steps, tokens, schedule.rows(tokens)))
        last = self._stairs[bisect_left(self._stairs, total_tokens, key=lambda stair: stair.tokens_before) - 1]
        self.num_steps = last.first_step + -(-(total_tokens - last.tokens_before) // (last.rows * seq_len))

    def step(self, number: int) -> Step:
        """Return a step by its number, from 0; one past the end is what a longer run would see."""
        stair = self._stairs[bisect_right(self._stairs, number, key=lambda stair: stair.first_step) - 1]
        tokens = stair.tokens_before + (number - stair.first_step) * stair.rows * self.seq_len
        return Step(tokens, stair.rows)

    def step_at(self, tokens_seen: int) -> int:
        """Return the number of the step that begins after ``tokens_seen`` tokens.

        Raises:
            ValueError: If none does: the tokens were consumed under another schedule.
        """
        stair = self._stairs[bisect_right(self._stairs, tokens_seen, key=lambda stair: stair.tokens_before) - 1]
        steps, rest = divmod(tokens_seen - stair.tokens_before, stair.rows * self.seq_len)
        if tokens_seen < 0 or rest:
            raise ValueError(
                f"the run stands at {tokens_seen} tokens, where no step of batch_size {self.schedule.batch_size}, "
                f"ramp_tokens {self.schedule.ramp_tokens} and seq_len {self.seq_len} begins: continue with the values "
                "it began with"
            )
        return stair.first_step + steps

    def steps(self, tokens_seen: int = 0) -> Iterator[Step]:
        """Yield the steps from the one that begins after ``tokens_seen`` tokens; see :meth:`step_at`."""
        for number in range(self.step_at(tokens_seen), self.num_steps):
            yield self.step(number)


def micro_batch(step: Step, seq_len: int, *, micro: int, accumulate: int, rank: int, world_size: int) -> range:
    """Return the positions of the training order that a rank sees in one micro-batch of a step."""
    rows = step.rows // (accumulate * world_size)
    start = step.tokens_before // seq_len + (micro * world_size + rank) * rows
    return range(start, start + rows)
