"""The same run made twice. The oracle is its twin, bitwise; another seed shows that the two could differ."""

import json
from typing import Any

import pytest

from tests.callbacks.toy_run import differences
from tests.training.ranks import run_ranks
from tests.training.toy_zero import settings, train

SEEN = ("points", "biases", "weights")
NO_DIFFERENCE: dict[str, list[str]] = {name: [] for name in SEEN}


def test_the_same_seed_trains_the_same_bits_twice() -> None:
    first, second, other = (train(settings(accumulate=2, seed=seed)) for seed in (0, 0, 1))
    assert {name: differences(first[name], second[name]) for name in SEEN} == NO_DIFFERENCE
    assert first["points"][0]["train/loss"] != other["points"][0]["train/loss"]
    assert len(differences(first["weights"], other["weights"])) > len(first["weights"]) / 2


@pytest.mark.soak
def test_the_same_seed_trains_the_same_bits_twice_on_two_ranks() -> None:
    stages = (1, 2, 3)
    runs: list[dict[str, Any]] = [settings(stage=stage, accumulate=2) for stage in stages for _ in range(2)]
    for made in run_ranks("tests.training.toy_zero:main", json.dumps(runs)):
        for index, stage in enumerate(stages):
            first, second = made[2 * index : 2 * index + 2]
            assert {name: differences(first[name], second[name]) for name in SEEN} == NO_DIFFERENCE, stage
