"""Oracles: closed forms, and the schedule of DeepSeek-V3 in tokens as its report states it (section 4.2)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ds_lightning.optim import Stairs, V3Schedule, WarmupStableDecay

TOTAL = 14.8e12
V3 = Path(__file__).parents[2] / "configs/pretrain/v3.yaml"


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (0, 0.0),
        (0.0017 * TOTAL / 4, 2.2e-4 / 4),
        (0.0017 * TOTAL, 2.2e-4),
        (1e12, 2.2e-4),
        (10e12, 2.2e-4),
        (10e12 + 4.3e12 / 4, 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi / 4)) / 2),
        (10e12 + 4.3e12 / 2, (2.2e-4 + 2.2e-5) / 2),
        (10e12 + 4.3e12 * 3 / 4, 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 - math.cos(math.pi / 4)) / 2),
        (14.3e12, 2.2e-5),
        (14.3e12 + 332.9e9, 2.2e-5),
        (14.3e12 + 333.1e9, 7.3e-6),
        (TOTAL, 7.3e-6),
    ],
)
def test_the_rate_of_v3_is_the_published_one(tokens: float, rate: float) -> None:
    assert 2.2e-4 * V3Schedule()(tokens / TOTAL) == pytest.approx(rate, rel=1e-12)


def test_the_rise_of_v3_takes_two_thousand_of_its_first_batches() -> None:
    assert V3Schedule().warmup == pytest.approx(2000 * 3072 * 4096 / TOTAL, abs=5e-5)


def test_v3_may_rise_over_another_share_or_not_at_all() -> None:
    assert [V3Schedule(warmup=0.1)(progress) for progress in (0, 0.05, 0.1, 0.5)] == [0, 0.5, 1, 1]
    assert V3Schedule(warmup=0.0)(0.0) == 1.0


def test_the_config_of_v3_has_the_reports_rate_bias_speed_and_prediction_weight() -> None:
    settings = yaml.safe_load(V3.read_text(encoding="utf-8"))["model"]["init_args"]
    assert settings["total_tokens"] == TOTAL
    assert settings["lr"] == 2.2e-4
    assert settings["lr_schedule"] == {"class_path": "ds_lightning.optim.V3Schedule"}
    for key, end, before, after in (("bias_update_speed", 14.3e12, 0.001, 0.0), ("mtp_loss_weight", 10e12, 0.3, 0.1)):
        assert settings[key]["class_path"] == "ds_lightning.optim.Stairs"
        stairs = Stairs(**settings[key]["init_args"])
        assert stairs(0.0) == stairs(end * 0.999 / TOTAL) == before
        assert stairs(end * 1.001 / TOTAL) == stairs(1.0) == after


@pytest.mark.parametrize(
    ("settings", "points"),
    [
        ({}, {0: 0, 0.005: 0.5, 0.01: 1, 0.5: 1, 0.8: 1, 0.9: 0.5, 1: 0}),
        ({"warmup": 0.25, "decay": 0.5, "final": 0.2}, {0.125: 0.5, 0.25: 1, 0.5: 1, 0.75: 0.6, 1: 0.2}),
        ({"warmup": 0.0, "decay": 0.4, "shape": "cosine"}, {0: 1, 0.6: 1, 0.7: (2 + 2**0.5) / 4, 0.8: 0.5, 1: 0}),
        ({"decay": 0.4, "final": 0.1, "shape": "cosine"}, {0.8: 0.55, 0.9: 0.1 + 0.9 * (2 - 2**0.5) / 4, 1: 0.1}),
        ({"warmup": 0.2, "decay": 0.8}, {0.1: 0.5, 0.2: 1, 0.6: 0.5, 1: 0}),  # no constant stretch
        ({"warmup": 0.5, "decay": 0.0}, {0.25: 0.5, 0.5: 1, 1: 1}),
        ({"warmup": 1.0, "decay": 0.0}, {0.75: 0.75, 1: 1}),
        ({"warmup": 0.0, "decay": 1.0}, {0: 1, 0.75: 0.25, 1: 0}),
    ],
)
def test_warm_up_constant_and_decay_are_their_closed_form(settings: Any, points: dict[float, float]) -> None:
    schedule = WarmupStableDecay(**settings)
    assert {progress: schedule(progress) for progress in points} == pytest.approx(points, abs=1e-12)


@given(
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from(["linear", "cosine"]),
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
)
def test_the_factor_rises_then_falls_between_zero_and_one(
    warmup: float, rest: float, final: float, shape: Any, at: list[float]
) -> None:
    decay = (1 - warmup) * rest
    schedule = WarmupStableDecay(warmup, min(decay, 1 - warmup), final, shape)
    earlier, later = map(schedule, at)
    assert 0 <= earlier <= 1
    assert 0 <= later <= 1
    slack = 1e-9
    if at[1] < warmup:
        assert earlier <= later + slack
    if at[0] >= warmup:
        assert later <= earlier + slack
        assert later >= final - slack


def test_stairs_jump_where_a_stair_ends() -> None:
    stairs = Stairs([3.0, 2.0, 0.0], [0.25, 0.75])
    assert [stairs(progress) for progress in (0, 0.249, 0.25, 0.5, 0.749, 0.75, 1)] == [3, 3, 2, 2, 2, 0, 0]
    assert Stairs([0.5], [])(0.3) == 0.5


@pytest.mark.parametrize(
    ("values", "until", "message"),
    [
        ([1.0], [0.5], r"values has 1 entries and until 1, expected one value more"),
        ([], [], r"values has 0 entries and until 0, expected one value more"),
        ([1.0, 2.0], [1.0], r"until is \[1.0\], expected rising numbers between 0 and 1"),
        ([1.0, 2.0], [0.0], r"until is \[0.0\], expected rising numbers between 0 and 1"),
        ([1.0, 2.0], [math.nan], r"until is \[nan\], expected rising numbers between 0 and 1"),
        ([1.0, 2.0, 3.0], [0.6, 0.4], r"until is \[0.6, 0.4\], expected rising numbers between 0 and 1"),
        ([1.0, 2.0, 3.0], [0.5, 0.5], r"until is \[0.5, 0.5\], expected rising numbers between 0 and 1"),
    ],
)
def test_impossible_stairs_are_refused(values: list[float], until: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Stairs(values, until)


@pytest.mark.parametrize("final", [-0.1, 1.1, math.nan])
def test_a_final_factor_that_is_none_is_refused(final: float) -> None:
    with pytest.raises(ValueError, match=f"^final is {final}, expected a factor between 0 and 1$"):
        WarmupStableDecay(final=final)


@pytest.mark.parametrize(("warmup", "decay"), [(-0.1, 0.2), (0.1, -0.2), (0.6, 0.5), (math.nan, 0.2), (0.1, math.nan)])
def test_parts_that_do_not_fit_into_a_run_are_refused(warmup: float, decay: float) -> None:
    message = f"^warmup is {warmup} and decay {decay}, expected shares of the run that sum to at most 1$"
    with pytest.raises(ValueError, match=message):
        WarmupStableDecay(warmup, decay)


@pytest.mark.parametrize("warmup", [-0.1, 0.7, math.nan])
def test_a_rise_of_v3_that_does_not_end_before_its_fall_is_refused(warmup: float) -> None:
    message = rf"^warmup is {warmup}, expected a share of the run from 0 to 0\.6757 \(10T tokens\)$"
    with pytest.raises(ValueError, match=message):
        V3Schedule(warmup)
