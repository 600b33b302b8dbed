"""Sharded checkpoints: resume, damage, and disks that fail on one rank.

The oracle of resume is the run that was left alone, on the same two ranks, with noise from each rank's own random
generator in every loss: curves, weights, biases and all tensors of the last checkpoint, compared bitwise. Damage is
made on purpose and must be named. The disk that is full is a limit on the size of files, on one rank alone.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_lightning.training import checkpoint
from ds_lightning.training.export import load_weights
from tests.training.ranks import run_ranks
from tests.training.toy_zero import STEPS
from tests.training.toy_zero_saves import NAMES

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each rank returns of all runs."""
    return run_ranks("tests.training.toy_zero_saves:main", str(folder))


def tensors(state: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors within, by path."""
    if isinstance(state, Tensor):
        yield path, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors(value, f"{path}/{key}")
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from tensors(value, f"{path}/{index}")


def content(path: Path) -> dict[str, Tensor]:
    """Return all tensors in a checkpoint by file and path; it is one that this test has written."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name != checkpoint.MANIFEST]
    return {
        f"{file.relative_to(path)}{name}": tensor
        for file in files
        for name, tensor in tensors(torch.load(file, map_location="cpu", weights_only=False))
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_run_stopped_by_a_signal_to_one_rank_resumes_bitwise(
    ranks: list[dict[str, Any]], folder: Path, name: str
) -> None:
    for rank in ranks:
        straight, stopped, resumed = rank["resume"][name]
        assert stopped["stopped"]
        assert len(stopped["points"]) == resumed["first"] == 3
        assert stopped["points"] + resumed["points"] == straight["points"]
        assert len({point["train/loss"] for point in straight["points"]}) == STEPS
        for key, weight in straight["weights"].items():
            assert torch.equal(resumed["weights"][key], weight), key
        for key, bias in straight["biases"][-1].items():
            assert torch.equal(resumed["biases"][-1][key], bias), key
    last = f"checkpoints/step-{STEPS:08d}"
    expected = content(folder / name / "straight" / last)
    found = content(folder / name / "parts" / last)
    assert len(expected) > 20
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def test_ranks_draw_different_numbers(folder: Path, ranks: list[dict[str, Any]]) -> None:
    path = folder / "2 adamw" / "straight" / f"checkpoints/step-{STEPS:08d}"
    first, second = (torch.load(path / checkpoint.rank_file(rank))["torch"] for rank in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", NAMES)
def test_the_shards_make_up_the_weights(ranks: list[dict[str, Any]], folder: Path, name: str) -> None:
    newest, skipped = checkpoint.newest_valid(folder / name / "straight" / "checkpoints")
    assert newest is not None
    assert skipped == []
    manifest = checkpoint.verify(newest)
    assert (manifest.step, manifest.ranks, manifest.zero_stage) == (STEPS, 2, int(name[0]))
    state, straight = load_weights(newest), ranks[0]["resume"][name][0]
    expected = {**straight["weights"], **straight["biases"][-1]}
    assert state.keys() == expected.keys()
    assert [key for key, tensor in expected.items() if not torch.equal(state[key], tensor)] == []


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "found"), [(_truncate, "bytes, expected"), (Path.unlink, "is missing"), (_flip, "has sha256")]
)
def test_a_damaged_shard_is_named_and_the_older_checkpoint_taken(
    ranks: list[dict[str, Any]], folder: Path, tmp_path: Path, damage: Any, found: str
) -> None:
    run = tmp_path / "checkpoints"
    shutil.copytree(folder / "2 adamw" / "straight" / "checkpoints", run)
    [*_, older, newest] = sorted(run.iterdir())
    shard = sorted(newest.rglob("*optim_states.pt"))[1]
    damage(shard)
    valid, [skipped] = checkpoint.newest_valid(run)
    assert valid == older
    assert str(skipped).startswith(f"skipped checkpoint {newest}: {shard.relative_to(newest)} ")
    assert found in str(skipped)


def test_a_full_disk_on_one_rank_costs_all_of_them_the_same_save(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        passing = rank["full disk"][0]
        assert passing["error"] == ""
        assert passing["failed_saves"] == 1
        assert passing["saved"] == ["step-00000004", "step-00000006"]
        assert passing["points"] == rank["resume"]["2 adamw"][0]["points"]


def test_a_full_disk_at_the_end_fails_all_ranks_and_spares_the_old_checkpoint(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["full disk"][1] for rank in ranks)
    assert first["error"] == "OSError: [Errno 27] File too large on rank 1"
    assert second["error"] == "OSError: [Errno 27] File too large"
    assert first["saved"] == second["saved"] == ["step-00000002", "step-00000004"]


def test_a_bit_that_one_rank_holds_alone_ends_the_run_on_all(ranks: list[dict[str, Any]]) -> None:
    start = "RunFailedError: step 3: model.lm_head.weight differs on ranks 0, 1 of 2, as do 1 of "
    for rank, error in zip(ranks, (start, "SystemExit: 1"), strict=True):
        run = rank["flipped"]
        assert len(run["points"]) == 3
        assert run["error"].startswith(error)
        assert run["saved"] == ["step-00000002"]
