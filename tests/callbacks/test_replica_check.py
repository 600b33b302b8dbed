"""Oracle: one bit turned on purpose."""

import json
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from ds_lightning.callbacks import ReplicaCheck
from ds_lightning.callbacks.replica_check import bit_sum, difference
from tests.callbacks.toy_faults import breaking
from tests.training.ranks import run_ranks

WEIGHT, BIAS = "model.layers.1.self_attn.o_proj.weight", "model.layers.2.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bit", [0, 3, 15])
def test_any_flipped_bit_changes_the_sum(dtype: torch.dtype, bit: int) -> None:
    tensor = torch.randn(7, 5).to(dtype)
    flipped = tensor.clone()
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flipped.view(word)[3, 2] ^= torch.tensor(1).bitwise_left_shift(torch.tensor(bit)).to(word)
    assert bit_sum(tensor) == bit_sum(tensor.clone())
    assert bit_sum(tensor) != bit_sum(flipped)


def test_the_sum_is_of_the_bits_and_not_of_the_values() -> None:
    assert bit_sum(torch.tensor([0.0, -0.0])) != bit_sum(torch.tensor([0.0, 0.0]))
    assert bit_sum(torch.full((3,), float("nan"))) == bit_sum(torch.full((3,), float("nan")))


@pytest.mark.parametrize(
    ("sums", "expected"),
    [
        ([[1, 2, 3]] * 4, None),
        ([[1, 2, 3], [1, 2, 3], [1, 9, 3], [1, 2, 3]], "b differs on ranks 2 of 4, as do 1 of 3 tensors"),
        ([[1, 2, 3], [1, 9, 8]], "b differs on ranks 0, 1 of 2, as do 2 of 3 tensors"),
        ([[7, 2, 3], [1, 2, 3], [1, 2, 3]], "a differs on ranks 0 of 3, as do 1 of 3 tensors"),
    ],
)
def test_the_rank_that_differs_from_most_is_named(sums: list[list[int]], expected: str | None) -> None:
    assert difference(torch.tensor(sums), ["a", "b", "c"]) == expected


def test_an_interval_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^replica_check\.every_n_steps is 0, expected at least 1$"):
        ReplicaCheck(every_n_steps=0)


def test_a_piece_of_a_buffer_has_the_sum_of_its_copy() -> None:
    buffer = torch.randn(40)
    assert bit_sum(buffer[3:20]) == bit_sum(buffer[3:20].clone())
    assert bit_sum(buffer[3:20]) != bit_sum(buffer[2:19])
    assert bit_sum(torch.tensor(3, dtype=torch.int64)) == 3


def test_one_process_has_nothing_to_compare() -> None:
    ReplicaCheck(every_n_steps=1).on_before_optimizer_step(Mock(world_size=1, global_step=0), Mock(), None)


RUNS: dict[str, list[Any]] = {
    "ddp": [breaking({}, stage=0), 3, WEIGHT],
    "1": [breaking({}, stage=1), 4, WEIGHT],
    "2": [breaking({}, stage=2), 2, WEIGHT],
    "2 bf16": [breaking({}, stage=2, precision="bf16-mixed"), 2, WEIGHT],
    "3 bias": [breaking({}, stage=3), 2, BIAS],
    "never": [breaking({}, stage=3), 99, BIAS],
}
FOUND = {"ddp": 4, "1": 4, "2": 2, "2 bf16": 2, "3 bias": 2}


@pytest.fixture(scope="module")
def ranks() -> dict[str, list[list[Any]]]:
    results = run_ranks("tests.callbacks.toy_faults:flip", json.dumps(list(RUNS.values())))
    return {name: [rank[index] for rank in results] for index, name in enumerate(RUNS)}


@pytest.mark.soak
@pytest.mark.parametrize("name", FOUND)
def test_a_flipped_bit_is_found_at_the_next_check(ranks: dict[str, list[list[Any]]], name: str) -> None:
    (first, made), second = ranks[name]
    assert first.startswith(f"step {FOUND[name]}: {RUNS[name][2]} differs on ranks 0, 1 of 2, as do 1 of ")
    assert first.endswith(f" delete the checkpoints after step {FOUND[name] - 2}, and go on from the newest")
    assert second == ["status 1", made]
    assert made == FOUND[name], "the step that would have spread it is not made"


@pytest.mark.soak
def test_ranks_that_agree_go_on(ranks: dict[str, list[list[Any]]]) -> None:
    assert ranks["never"] == [["", 6], ["", 6]]
