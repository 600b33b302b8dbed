"""Oracles: a permutation hits every number once; a Python loop that consumes tokens step by step."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning.data import BatchSchedule, StepPlan
from ds_lightning.data.sampler import Step, micro_batch, permute, row_order


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 1000, 4096, 65537])
@pytest.mark.parametrize("key", [(0, 0), (0, 1), (7, 0)])
def test_the_order_of_an_epoch_is_a_permutation(size: int, key: tuple[int, int]) -> None:
    image = permute(np.arange(size), size, seed=key[0], epoch=key[1])
    assert sorted(image.tolist()) == list(range(size))


def test_seeds_and_epochs_have_permutations_of_their_own() -> None:
    images = [permute(np.arange(1000), 1000, seed=seed, epoch=epoch) for seed in range(3) for epoch in range(3)]
    for one, other in itertools.combinations(images, 2):
        assert np.mean(one == other) < 0.02


def test_the_permutation_looks_random() -> None:
    size = 100_000
    image = permute(np.arange(size), size, seed=1, epoch=0)
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.02
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.02
    assert np.mean(np.abs(np.diff(image)) < 10) < 0.001
    quarters = np.histogram2d(np.arange(size), image, bins=4)[0]
    assert np.all(np.abs(quarters - size / 16) < 0.05 * size / 16)


def test_a_huge_permutation_takes_no_memory_and_no_time() -> None:
    start = time.monotonic()
    image = permute(np.arange(10**13, 10**13 + 1000), 10**14, seed=0, epoch=0)
    assert time.monotonic() - start < 1
    assert len(np.unique(image)) == 1000
    assert image.max() < 10**14


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(0, 1000), st.integers(0, 200), st.integers(0, 200))
def test_an_order_read_in_parts_is_the_order_read_at_once(size: int, start: int, first: int, second: int) -> None:
    whole = row_order(size, start, first + second, seed=3)
    parts = [row_order(size, start, first, seed=3), row_order(size, start + first, second, seed=3)]
    assert whole.tolist() == np.concatenate(parts).tolist()


def test_every_epoch_reads_every_row_once() -> None:
    order = row_order(37, 0, 37 * 3, seed=5).reshape(3, 37)
    for epoch in order:
        assert sorted(epoch.tolist()) == list(range(37))
    assert order[0].tolist() != order[1].tolist()


SCHEDULES = [
    BatchSchedule(8),
    BatchSchedule(16, 1000, 4, 4),
    BatchSchedule(16, 1000, 4, 1),
    BatchSchedule(12, 100_000, 12, 12),
    BatchSchedule(64, 5, 2, 2),
    BatchSchedule(30, 777, 3, 3),
]


def consumed_steps(schedule: BatchSchedule, seq_len: int, total_tokens: int) -> list[Step]:
    steps = []
    tokens = 0
    while tokens < total_tokens:
        steps.append(Step(tokens, schedule.rows(tokens)))
        tokens += schedule.rows(tokens) * seq_len
    return steps


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total_tokens", [1, 31, 32, 33, 500, 999, 1000, 1001, 5000, 100_000])
def test_the_plan_is_what_consuming_tokens_step_by_step_gives(schedule: BatchSchedule, total_tokens: int) -> None:
    plan = StepPlan(schedule, 4, total_tokens)
    expected = consumed_steps(schedule, 4, total_tokens)
    assert list(plan.steps()) == expected
    assert plan.num_steps == len(expected)
    for number, step in enumerate(expected):
        assert plan.step_at(step.tokens_before) == number
        assert list(itertools.islice(plan.steps(step.tokens_before), 3)) == expected[number : number + 3]


def test_the_ramp_grows_evenly_from_the_first_to_the_full_batch() -> None:
    schedule = BatchSchedule(15360, 469_000_000_000, 3072, 3072)
    assert [schedule.rows(tokens * 10**9) for tokens in (0, 117, 118, 235, 352, 468, 469)] == [
        3072, 3072, 6144, 9216, 12288, 12288, 15360,
    ]  # fmt: skip


def test_a_plan_of_a_ramp_of_many_steps_is_made_at_once() -> None:
    start = time.monotonic()
    plan = StepPlan(BatchSchedule(8, 469_000_000_000, 4, 4), 64, 14_800_000_000_000)
    assert time.monotonic() - start < 0.1
    assert plan.step(plan.num_steps - 1).tokens_before < plan.total_tokens
    assert plan.step(plan.num_steps).tokens_before >= plan.total_tokens


def test_a_longer_plan_begins_with_the_shorter_one() -> None:
    short, long = (StepPlan(SCHEDULES[1], 4, total) for total in (300, 3000))
    assert list(long.steps())[: short.num_steps] == list(short.steps())
    assert list(short.steps(long.step(short.num_steps + 3).tokens_before)) == []


@pytest.mark.parametrize("tokens", [*range(-64, 0, 4), 1, 17, 47])
def test_a_position_between_steps_belongs_to_another_schedule(tokens: int) -> None:
    plan = StepPlan(BatchSchedule(16, 1000, 4, 4), 4, 5000)
    with pytest.raises(ValueError, match=rf"stands at {tokens} tokens, where no step of batch_size 16.*continue with"):
        plan.step_at(tokens)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (1, 4), (2, 2), (4, 1), (2, 1), (1, 2)])
def test_a_step_is_shared_out_whole_whatever_the_ranks_and_the_accumulation(world_size: int, accumulate: int) -> None:
    for step in StepPlan(BatchSchedule(16, 1000, 4, 4), 4, 3000).steps():
        positions = [
            position
            for micro in range(accumulate)
            for rank in range(world_size)
            for position in micro_batch(step, 4, micro=micro, accumulate=accumulate, rank=rank, world_size=world_size)
        ]
        assert positions == list(range(step.tokens_before // 4, step.tokens_before // 4 + step.rows))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "batch_size is 0 and ramp_multiple 1, expected at least 1"),
        ((8, 0, None, 0), "batch_size is 8 and ramp_multiple 0, expected at least 1"),
        ((8, -1), "ramp_tokens is -1, expected 0"),
        ((8, 100), "ramp_tokens is 100 and start_batch_size None, expected both or none"),
        ((8, 0, 4), "ramp_tokens is 0 and start_batch_size 4, expected both or none"),
        ((8, 100, 16), r"start_batch_size is 16, expected 1 to batch_size \(8\)"),
        ((8, 100, 0), r"start_batch_size is 0, expected 1 to batch_size \(8\)"),
        ((10, 100, 4, 4), r"batch_size is 10, expected a multiple of ramp_multiple \(4\)"),
        ((8, 100, 2, 4), r"start_batch_size is 2, expected a multiple of ramp_multiple \(4\)"),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchSchedule(*arguments)


def test_a_plan_needs_tokens() -> None:
    with pytest.raises(ValueError, match="total_tokens is 0, expected at least 1"):
        StepPlan(BatchSchedule(8), 4, 0)
