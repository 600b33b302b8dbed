"""Oracles: the run that never saw the broken step, bitwise; NumPy over a list of steps; one process for two ranks.

Learning rate and speed of the routing bias are constant here: they follow tokens, of which a skipped step has some.
"""

import io
import json
import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from ds_lightning.callbacks import SkipSteps
from ds_lightning.training.step_filter import StepFilter
from tests.callbacks.toy_faults import Broken, breaking, train
from tests.callbacks.toy_run import differences
from tests.training.ranks import run_ranks
from tests.training.toy_pretraining import draw_step
from tests.training.toy_zero import STEPS, rows_of, trainer_of, whole_weights

NAN, INF = math.nan, math.inf
KEPT = ("weights", "optimizer", "biases", "load")
NO_DIFFERENCE: dict[str, list[str]] = {name: [] for name in KEPT}
SPIKES = {"sigma": 6.0, "window": 3}


@pytest.mark.parametrize("step", [0, 3, STEPS - 1])
@pytest.mark.parametrize(("optimizer", "accumulate"), [("adamw", 1), ("adamw", 2), ("muon", 2)])
@pytest.mark.parametrize("factor", [NAN, INF])
def test_a_step_that_is_not_finite_leaves_nothing_behind_but_its_tokens(
    step: int, optimizer: str, accumulate: int, factor: float
) -> None:
    module = {"lr": 1e-2, "optimizer": optimizer}
    broken = train(breaking({step: factor}, accumulate=accumulate, module=module))
    without = train(breaking({}, accumulate=accumulate, module=module), leave_out=step)
    if step == 0:  # there is no earlier load to keep
        broken["load"], without["load"] = broken["load"][1], without["load"][1]
    if step == STEPS - 1:
        assert not any(math.isnan(float(weight.sum())) for weight in broken["weights"].values())
    assert {name: differences(broken[name], without[name]) for name in KEPT} == NO_DIFFERENCE
    assert broken["tokens"] - without["tokens"] == draw_step(step)["step_tokens"]
    assert [point["train/skipped_steps"] for point in broken["points"]] == [0] * step + [1] * (STEPS - step)
    assert broken["skipped"] == 1
    assert not math.isfinite(broken["points"][step]["train/grad_norm"])


def test_without_the_callback_such_a_step_ruins_the_weights() -> None:
    run = breaking({3: NAN})
    torch.manual_seed(0)
    module = Broken(run["factors"], **run["module"])
    trainer = trainer_of(run)
    trainer.fit(module, rows_of(run, trainer))
    assert any(weight.isnan().any() for weight in whole_weights(trainer, module).values())


def test_a_filter_that_skips_nothing_changes_no_bit() -> None:
    with_spikes, without = train(breaking({}, SPIKES)), train(breaking({}))
    assert {name: differences(with_spikes[name], without[name]) for name in KEPT} == NO_DIFFERENCE


def test_a_spike_is_skipped_where_that_is_asked_for() -> None:
    spiking, without = train(breaking({4: 100.0}, SPIKES)), train(breaking({}, SPIKES), leave_out=4)
    assert spiking["skipped"] == 1
    assert {name: differences(spiking[name], without[name]) for name in KEPT} == NO_DIFFERENCE
    assert spiking["points"][4]["train/grad_norm"] > 50 * spiking["points"][3]["train/grad_norm"]
    assert train(breaking({4: 100.0}))["skipped"] == 0
    assert train(breaking({2: 100.0}, SPIKES))["skipped"] == 0, "the window of three is not full yet"


def test_skipped_steps_in_a_row_end_the_run_with_one_line() -> None:
    result = train(breaking({1: NAN, 3: NAN, 4: NAN}, {"end_after": 2}))
    tokens = sum(draw_step(seed)["step_tokens"] for seed in range(5))
    assert result["error"] == (
        "step 5: the loss is nan and the norm of the gradient nan; 2 steps in a row were skipped as not finite, "
        "expected fewer than skip_steps.end_after (2): lower the learning rate, or look at the data before token "
        f"{tokens}; the same command goes on from the newest checkpoint"
    )
    assert result["skipped"] == 3
    assert all(weight.isfinite().all() for weight in result["weights"].values())


def test_the_line_tells_of_spikes_where_they_are_skipped() -> None:
    result = train(breaking({4: 100.0}, {**SPIKES, "end_after": 1}))
    assert re.match(
        r"step 5: the loss is \d+\.?\d* and the norm of the gradient \d+\.?\d*; 1 steps in a row", result["error"]
    )
    assert "skipped as not finite, or 6 sigma above those before, expected" in result["error"]


def decide(steps: list[tuple[float, float]], sigma: float, window: int) -> list[bool]:
    """The rule by a loop over lists."""
    made: list[tuple[float, float]] = []
    skipped = []
    for step in steps:
        last = np.array(made[-window:])
        spike = len(made) >= window and (np.array(step) > last.mean(axis=0) + sigma * last.std(axis=0, ddof=1)).any()
        skipped.append(bool(spike) or not np.isfinite(step).all())
        if not skipped[-1]:
            made.append(step)
    return skipped


def drawn(count: int, seed: int) -> list[tuple[float, float]]:
    """Return losses and norms with spikes and what is not finite among them."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(3.0, 0.1, (count, 2)) * np.where(
        rng.random((count, 2)) < 0.1, rng.choice([0.1, 1.2, 2], (count, 2)), 1
    )
    steps[rng.random((count, 2)) < 0.03] = rng.choice([NAN, INF, -INF])
    return [(float(loss), float(norm)) for loss, norm in steps.astype(np.float32)]


def ask(asked: StepFilter, steps: list[tuple[float, float]]) -> list[bool]:
    answers = []
    for loss, norm in steps:
        for part in (0.25, 0.75):
            asked.add_loss(torch.tensor(loss, dtype=torch.float64) * part)
        answers.append(bool(asked(torch.tensor(norm))))
        asked.end_step()
    return answers


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("window", [2, 5, 16])
def test_the_rule_is_that_of_a_loop_over_lists(seed: int, window: int) -> None:
    steps = drawn(200, seed)
    expected = decide(steps, 4.0, window)
    assert ask(StepFilter(4.0, window, lambda tensor: tensor), steps) == expected
    assert sum(expected) > sum(not np.isfinite(step).all() for step in steps)
    assert expected != decide(steps, 3.0, window)


def test_what_is_averaged_over_ranks_is_where_the_loss_is() -> None:
    devices = list[str]()

    def mean(tensor: torch.Tensor) -> torch.Tensor:
        devices.append(tensor.device.type)
        return tensor

    asked = StepFilter(4.0, 3, mean)
    asked.add_loss(torch.zeros((), device="meta"))
    assert asked(torch.tensor(1.0)).device.type == "meta", "where states are in the host's memory, so is the norm"
    assert devices == ["meta"]


def test_a_resumed_run_goes_on_with_the_window() -> None:
    steps = drawn(60, seed=9)
    steps[30] = (30.0, 3.0)
    whole, first, second = (SkipSteps(sigma=4.0, window=8) for _ in range(3))
    expected = ask(whole._filter, steps)
    ask(first._filter, steps[:30])
    stored = io.BytesIO()
    torch.save(first.state_dict(), stored)
    stored.seek(0)
    second.load_state_dict(torch.load(stored, weights_only=True))
    assert ask(second._filter, steps[30:]) == expected[30:]
    assert differences(whole.state_dict(), second.state_dict()) == []
    assert ask(SkipSteps(sigma=4.0, window=8)._filter, steps[30:]) != expected[30:]
    other = SkipSteps(sigma=4.0, window=9)
    other.load_state_dict(first.state_dict())
    assert int(other._filter._filled) == 0, "a window of another length begins anew"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end_after": 0}, r"skip_steps\.end_after is 0, expected at least 1"),
        ({"sigma": 0.0}, r"skip_steps\.sigma is 0\.0, expected more than 0 or null"),
        ({"sigma": NAN}, r"skip_steps\.sigma is nan, expected more than 0 or null"),
        ({"window": 1}, r"skip_steps\.window is 1, expected at least 2"),
    ],
)
def test_a_number_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        SkipSteps(**options)


RUNS = {
    "ddp": breaking({2: NAN, 4: 200.0}, SPIKES, stage=0),
    **{str(stage): breaking({2: NAN, 4: 200.0}, SPIKES, stage=stage, accumulate=2) for stage in (1, 2, 3)},
    "bf16 1": breaking({2: NAN, 4: 200.0}, SPIKES, stage=1, precision="bf16-mixed"),
    "offloaded": breaking({2: NAN, 4: 200.0}, SPIKES, stage=3, offload=True),
    "ended": breaking({2: NAN, 3: NAN}, {"end_after": 2}, stage=2),
    "ended ddp": breaking({2: NAN, 3: NAN}, {"end_after": 2}, stage=0),
}


@pytest.fixture(scope="module")
def ranks() -> dict[str, list[dict[str, Any]]]:
    results = run_ranks("tests.callbacks.toy_faults:main", json.dumps(list(RUNS.values())))
    return {name: [rank[index] for rank in results] for index, name in enumerate(RUNS)}


@pytest.mark.soak
@pytest.mark.parametrize("name", ["ddp", "1", "2", "3", "bf16 1", "offloaded"])
def test_all_ranks_skip_what_one_of_them_broke(ranks: dict[str, list[dict[str, Any]]], name: str) -> None:
    counts = [[0, 0, 1, 1, 2, 2]] * 2
    assert [[point["train/skipped_steps"] for point in result["points"]] for result in ranks[name]] == counts
    first, second = ranks[name]
    assert differences(first["weights"], second["weights"]) == []
    assert differences(first["biases"], second["biases"]) == []
    if name != "bf16 1":
        expected = train(breaking({2: NAN, 4: 200.0}, SPIKES))
        for key in ("weights", "biases"):
            for tensor, wanted in expected[key].items():
                torch.testing.assert_close(
                    first[key][tensor], wanted, rtol=0, atol=3e-6
                )  # see tests/training/test_zero.py


@pytest.mark.soak
@pytest.mark.parametrize("name", ["ended", "ended ddp"])
def test_all_ranks_end(ranks: dict[str, list[dict[str, Any]]], name: str) -> None:
    first, second = ranks[name]
    assert "2 steps in a row were skipped as not finite" in first["error"]
    assert second["error"] == "status 1"
