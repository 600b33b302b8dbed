"""Oracle: one bit turned on purpose. Two real ranks compare in the tests of sharded checkpoints."""

import pytest
import torch

from ds_lightning.callbacks import ReplicaCheck
from ds_lightning.callbacks.replica_check import bit_sum, difference


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
    with pytest.raises(ValueError, match="every_n_steps is 0, expected at least 1"):
        ReplicaCheck(every_n_steps=0)
