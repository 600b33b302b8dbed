"""Oracle: the numbers that each generator draws next, before and after."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from ds_lightning.training.random_state import restore_random_state, write_random_state


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_every_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    write_random_state(tmp_path / "state")
    expected = draws()
    assert draws() != expected
    assert restore_random_state(tmp_path / "state") == []
    assert draws() == expected


def test_a_file_that_is_missing_is_reported(tmp_path: Path) -> None:
    [line] = restore_random_state(tmp_path / "rank-00003.ckpt")
    assert line == (
        f"{tmp_path}/rank-00003.ckpt is missing: the random state of this rank is not restored, the run goes on from a "
        "fresh one"
    )


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="this process has a CUDA device in use")
def test_the_state_of_a_device_that_is_not_here_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_random_state(path)
    torch.save({**torch.load(path), "cuda": torch.zeros(16, dtype=torch.uint8)}, path)
    [line] = restore_random_state(path)
    assert line.startswith(f"random state of a CUDA device in {path}, none here: what follows is not bitwise")
