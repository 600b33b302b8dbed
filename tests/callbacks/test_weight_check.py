"""Oracles: a bit flipped by the test, and the names of ranks and tensors that it was flipped in."""

import json
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from ds_lightning.callbacks import WeightCheck
from ds_lightning.training.replicas import fingerprints, odd_ranks
from tests.callbacks.toy_faults import breaking
from tests.training.ranks import run_ranks

WEIGHT, BIAS = "model.layers.1.self_attn.o_proj.weight", "model.layers.2.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_every_single_bit_counts(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5).to(dtype) + 2
    ways = {int(fingerprints([tensor])[0])}
    for element in range(tensor.numel()):
        for bit in range(8 * tensor.element_size()):
            flipped = tensor.clone()
            view = flipped.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]).view(-1)
            view[element] ^= torch.tensor(1 << bit if bit < 8 * tensor.element_size() - 1 else -(1 << bit)).to(
                view.dtype
            )
            assert int(fingerprints([flipped])[0]) not in {int(fingerprints([tensor])[0])}, (element, bit)
    assert ways == {int(fingerprints([tensor.clone()])[0])}


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ([[1, 2, 3], [1, 2, 4], [1, 2, 3]], ([1], 2)),
        ([[1, 2, 3], [1, 2, 4]], ([0, 1], 2)),
        ([[1, 9, 3], [1, 2, 3], [1, 2, 3], [1, 2, 4], [1, 2, 3]], ([0, 3], 1)),
        ([[1, 2], [1, 2], [0, 2], [0, 2]], ([0, 1, 2, 3], 0)),
    ],
)
def test_those_outside_a_majority_are_named(table: list[list[int]], expected: tuple[list[int], int]) -> None:
    assert odd_ranks(torch.tensor(table)) == expected


def test_one_process_has_nothing_to_compare() -> None:
    WeightCheck(every_n_steps=1).on_before_optimizer_step(Mock(world_size=1, global_step=0), None, None)


def test_a_number_of_steps_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^weight_check\.every_n_steps is 0, expected at least 1$"):
        WeightCheck(every_n_steps=0)


def test_the_line_names_one_rank_and_the_last_check_that_passed() -> None:
    check, run = WeightCheck(), Mock(world_size=3, global_step=200)
    check._passed = 100
    assert check._line([1], "model.norm.weight", run) == (
        "step 200: rank 1 of 3 differs from the others in the weights, first in model.norm.weight, expected the same "
        "bits on all ranks, as at step 100: replace the device, delete checkpoints from after that, and run the same "
        "command again"
    )


RUNS: dict[str, list[Any]] = {
    "ddp": [breaking({}, stage=0), 3, WEIGHT],
    "ddp bias": [breaking({}, stage=0), 2, BIAS],
    "1": [breaking({}, stage=1), 4, WEIGHT],
    "2": [breaking({}, stage=2), 2, WEIGHT],
    "2 bf16": [breaking({}, stage=2, precision="bf16-mixed"), 2, WEIGHT],
    "3 bias": [breaking({}, stage=3), 3, BIAS],
    "never": [breaking({}, stage=3), 99, BIAS],
}
FOUND = {"ddp": 4, "ddp bias": 2, "1": 4, "2": 2, "2 bf16": 2, "3 bias": 4}


@pytest.fixture(scope="module")
def ranks() -> dict[str, list[list[Any]]]:
    results = run_ranks("tests.callbacks.toy_faults:flip", json.dumps(list(RUNS.values())))
    return {name: [rank[index] for rank in results] for index, name in enumerate(RUNS)}


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUND)
def test_a_flipped_bit_is_found_at_the_next_check(ranks: dict[str, list[list[Any]]], name: str) -> None:
    (first, made), second = ranks[name]
    assert first.startswith(
        f"step {FOUND[name]}: ranks 0, 1 of 2 differ from one another in the weights, first in {RUNS[name][2]}, expec"
    )
    assert second == ["status 1", made]
    assert made == FOUND[name], "the step that would have spread it is not made"


@pytest.mark.slow
def test_ranks_that_agree_go_on(ranks: dict[str, list[list[Any]]]) -> None:
    assert ranks["never"] == [["", 6], ["", 6]]
