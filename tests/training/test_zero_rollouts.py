"""Reinforcement learning and fine-tuning on two ranks.

The oracle is one process with the same seed: an answer's random numbers belong to its problem and its number there, so
the ranks together write the very tokens that one process writes, with the same rewards and advantages, exactly. Losses
and weights differ by the order of sums in fp32: as in ``test_zero``, with a slope of AdamW of lr / eps = 3 and four
steps, below 3e-6. For runs that are stopped and go on, the oracle is the run that was left alone, bitwise.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.ranks import run_ranks
from tests.training.test_sft import write_conversations
from tests.training.toy_rollouts import write_tokenizer
from tests.training.toy_zero_rollouts import attempt, fine_tune

pytestmark = pytest.mark.soak

Result = dict[str, Any]

STRATEGIES = ("ddp", "1", "2", "3")
KEEP: Result = {"reward": "length", "equal_groups": "keep"}
SETTINGS: dict[str, Result] = {
    "ddp": {"reward": "letter", "equal_groups": "resample"},
    "1": KEEP,
    "2": {"reward": "letter", "equal_groups": "skip"},
    "3": KEEP,
}
ACCUMULATE = {"ddp": 1, "1": 1, "2": 3, "3": 3}
PAD = 0


def runs(folder: Path) -> dict[str, Result]:
    """Return what the ranks do, in this order; a tokenizer lies in every folder."""
    made: dict[str, Result] = {}
    for strategy in STRATEGIES:
        settings = {"strategy": strategy, "accumulate": ACCUMULATE[strategy], **SETTINGS[strategy]}
        made[strategy] = {"folder": f"{folder}/{strategy}", **settings}
        made[f"{strategy} stopped"] = {"folder": f"{folder}/{strategy}-parts", "stop": 3, **settings}
        made[f"{strategy} resumed"] = {"folder": f"{folder}/{strategy}-parts", "resume": True, **settings}
        made[f"{strategy} raises"] = {"folder": f"{folder}/{strategy}-raises", **settings, "reward": "dislikes ccc"}
    for run in made.values():
        write_tokenizer(Path(run["folder"]))
    return made


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, sft: Path) -> list[Result]:
    """What each rank returns of all runs."""
    made = runs(tmp_path_factory.mktemp("rollouts"))
    return run_ranks("tests.training.toy_zero_rollouts:main", json.dumps(made), str(sft))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """One process, without accumulation, by what is done with groups without a gradient."""
    return {
        str(settings["equal_groups"]): attempt(str(tmp_path_factory.mktemp("one")), "one", **settings)
        for settings in SETTINGS.values()
    }


def answers(results: list[Result]) -> list[list[tuple[list[int], float]]]:
    """Return for each step the rows of all ranks with their advantages, without padding and what fills a batch."""
    steps: dict[int, list[tuple[list[int], float]]] = {}
    for result in results:
        for (step, rows), advantages in zip(result["batches"], result["advantages"], strict=True):
            for row, advantage in zip(rows, advantages, strict=True):
                end = max(place for place, token in enumerate(row) if token != PAD) + 1
                if advantage == advantage:
                    steps.setdefault(step, []).append((row[:end], advantage))
    return [sorted(rows) for _, rows in sorted(steps.items())]


def steps_logged(result: Result, strategy: str) -> list[dict[str, float]]:
    """Return what was logged with the last micro-batch of every step."""
    logged: list[dict[str, float]] = result["logged"][ACCUMULATE[strategy] - 1 :: ACCUMULATE[strategy]]
    return logged


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_equal_one_process(ranks: list[Result], one: dict[str, Result], strategy: str) -> None:
    expected, results = one[SETTINGS[strategy]["equal_groups"]], [rank[strategy] for rank in ranks]
    assert answers(results) == answers([expected])
    assert all(any(advantage for _, advantage in step) for step in answers([expected]))
    for result in results:
        assert result["counters"] == expected["counters"]
        last = steps_logged(result, strategy)
        assert len(last) == len(expected["logged"]) == 4
        for logged, wanted in zip(last, expected["logged"], strict=True):
            assert logged.keys() >= wanted.keys()
            for name, value in wanted.items():
                if name.startswith(("sampling/gap", "sampling/sampling_logp_difference")):
                    assert logged[name] < 1e-5, f"{name}: rounding, which is not the same for other micro-batches"
                elif not name.endswith(("_min", "/min")):  # where a micro-batch has no row that counts
                    assert logged[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
        assert result["weights"].keys() == expected["weights"].keys()
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight, rtol=0, atol=3e-6, msg=name)


def test_the_runs_are_some_that_could_differ(one: dict[str, Result]) -> None:
    kept, resampled = one["keep"], one["resample"]
    assert len({point["train/loss"] for point in kept["logged"]}) == 4
    assert kept["logged"][2]["kl"] > 1e-7
    assert kept["counters"][2] > 20, "most answers have a gradient"
    assert resampled["counters"][2] == 24, "all have: other problems took the place of those without"
    assert 0 < resampled["logged"][0]["frac_reward_zero_std"] < 1
    assert len(one["skip"]["batches"][0][1]) < len(kept["batches"][0][1]), "some groups are left out"
    moved = [name for name in kept["weights"] if name.startswith("model.")]
    for name in moved:
        same = torch.equal(kept["weights"][name], one["skip"]["weights"][name])
        assert same == name.startswith("model.mtp."), f"{name}: prediction modules do not learn, all others do"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_stopped_within_a_rollout_goes_on_bitwise(ranks: list[Result], strategy: str) -> None:
    for rank in ranks:
        straight, stopped, resumed = (rank[f"{strategy}{part}"] for part in ("", " stopped", " resumed"))
        assert {step for step, _ in stopped["batches"]} == {0, 1, 2}
        assert stopped["batches"] + resumed["batches"] == straight["batches"]
        logged = steps_logged(stopped, strategy) + steps_logged(resumed, strategy)
        for found, expected in zip(logged, steps_logged(straight, strategy), strict=True):
            assert found.items() <= expected.items(), "what a rollout logs comes with its first step alone"
            assert "train/loss" in found
        assert resumed["counters"] == straight["counters"]
        for name, weight in straight["weights"].items():
            assert torch.equal(resumed["weights"][name], weight), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_reward_that_raises_on_one_rank_ends_the_run_on_all(ranks: list[Result], strategy: str) -> None:
    first, second = (rank[f"{strategy} raises"]["error"] for rank in ranks)
    assert first == "ValueError: rank 1: reward 'dislikes' on completion 2: raised ValueError: I do not like ccc"
    assert second == "SystemExit: 1"


def test_fine_tuning_on_two_ranks_equals_one_process(ranks: list[Result], sft: Path) -> None:
    expected = fine_tune(str(sft), "one")
    assert len(expected["points"]) > 4
    for rank in ranks:
        for point, wanted in zip(rank["sft"]["points"], expected["points"], strict=True):
            assert point["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-5)
            assert point["train/grad_norm"] == pytest.approx(wanted["train/grad_norm"], rel=1e-5)
        for name, weight in expected["weights"].items():
            # A slope of 10, gradients of a norm of some 3, not clipped, and six steps.
            torch.testing.assert_close(rank["sft"]["weights"][name], weight, rtol=0, atol=3e-5, msg=name)
