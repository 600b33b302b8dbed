"""Oracles: the formulas as Python loops with the statistics module, and TRL's own deviation."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lightning.rl.advantages import (
    ScaleRewards,
    group_advantages,
    overlong_penalty,
    useful_groups,
)

NAN = math.nan
groups = st.lists(
    st.lists(st.one_of(st.floats(-2, 2), st.just(NAN), st.just(1.0)), min_size=4, max_size=4), min_size=1, max_size=3
)


def by_loops(rows: list[list[float]], scale: str) -> list[float]:
    everything = [value for row in rows for value in row if not math.isnan(value)]
    advantages = []
    for row in rows:
        known = [value for value in row if not math.isnan(value)]
        pool = everything if scale == "batch" else known
        deviation = statistics.stdev(pool) if len(pool) > 1 else 0.0
        divisor = 1.0 if scale == "none" else deviation + 1e-4
        advantages += [0.0 if math.isnan(value) else (value - statistics.fmean(known)) / divisor for value in row]
    return advantages


@settings(deadline=None)
@given(groups, st.sampled_from(["group", "batch", "none"]))
def test_advantages_are_distances_from_the_groups_mean(rows: list[list[float]], scale: ScaleRewards) -> None:
    rewards = torch.tensor(rows, dtype=torch.float64).flatten()
    advantages, _ = group_advantages(rewards, 4, scale_rewards=scale)
    # rounding of a mean, of 1e-16, is divided by as little as 1e-4
    assert advantages.tolist() == pytest.approx(by_loops(rows, scale), rel=1e-9, abs=1e-11)


def test_metrics_leave_out_what_has_no_reward() -> None:
    rewards = torch.tensor([1.0, 0.0, NAN, 1.0, 1.0, 1.0, 0.5, NAN, NAN], dtype=torch.float64)
    _, metrics = group_advantages(rewards, 3)
    assert float(metrics["reward"]) == pytest.approx(4.5 / 6)
    assert float(metrics["reward_std"]) == pytest.approx((statistics.stdev([1, 0]) + 0 + 0) / 3)
    assert float(metrics["frac_reward_zero_std"]) == pytest.approx(2 / 3)


def test_equal_rewards_give_no_advantage() -> None:
    advantages, metrics = group_advantages(torch.full((8,), 0.1), 4)
    assert advantages.abs().max() < 1e-3  # rounding of the mean in fp32, divided by 1e-4
    assert metrics["frac_reward_zero_std"] == 1


def test_useful_groups_are_those_whose_rewards_differ() -> None:
    rewards = torch.tensor([1.0, 1, 1, 0, 1, 0, NAN, 1, 0, NAN, NAN, NAN, NAN, 0.5, 0.5])
    assert useful_groups(rewards, 3).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0.0), (16, 0.0), (17, -0.25), (18, -0.5), (20, -1.0), (21, -1.0), (99, -1.0)]
)
def test_the_penalty_grows_over_the_last_tokens(length: int, penalty: float) -> None:
    assert overlong_penalty(torch.tensor([length]), max_tokens=20, cache_tokens=4).tolist() == [penalty]


@pytest.mark.parametrize("cache_tokens", [0, 21])
def test_a_margin_out_of_range_is_refused(cache_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"cache_tokens is {cache_tokens}, expected between 1 and max_tokens = 20"):
        overlong_penalty(torch.tensor([3]), max_tokens=20, cache_tokens=cache_tokens)


@pytest.mark.parametrize(("samples", "group_size"), [(6, 4), (0, 4), (4, 0)])
def test_samples_that_make_no_whole_groups_are_refused(samples: int, group_size: int) -> None:
    with pytest.raises(ValueError, match=f"{samples} rewards in groups of {group_size}, expected a positive multiple"):
        group_advantages(torch.zeros(samples), group_size)
    with pytest.raises(ValueError, match="the samples of a prompt stand together"):
        useful_groups(torch.zeros(samples), group_size)


def test_the_deviation_is_that_of_trl() -> None:
    trl = pytest.importorskip("trl.trainer.utils")
    rewards = torch.tensor([0.3, 1.0, NAN, 0.0, 2.0, 2.0, 1.0, NAN], dtype=torch.float64)
    rows = rewards.view(2, 4)
    expected = (rows - rows.nanmean(1, keepdim=True)) / (trl.nanstd(rows, dim=1).unsqueeze(1) + 1e-4)
    advantages, metrics = group_advantages(rewards, 4)
    torch.testing.assert_close(advantages, expected.nan_to_num(nan=0.0).flatten(), rtol=1e-12, atol=0)
    torch.testing.assert_close(metrics["reward_std"], trl.nanstd(rows, dim=1).mean())
