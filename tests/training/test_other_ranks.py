"""Runs that are stopped and gone on with by more or fewer ranks, or under another stage of ZeRO.

Two oracles: what DeepSpeed itself brings together of weights, buffers and the optimizer's states, bitwise the same when
the one run ends and when the other begins; and the run of one process left alone, whose curves and weights theirs equal
within fp32 rounding, for the reasons and with the bounds that ``test_zero`` gives.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_lightning.training import checkpoint
from ds_lightning.training.shards import whole_state
from tests.training.ranks import run_ranks
from tests.training.toy_reshard import MODULE, READERS, STOP, WRITERS
from tests.training.toy_zero import STEPS, settings, train

pytestmark = pytest.mark.soak

Result = dict[str, Any]

CASES = [(reader, *case) for reader, cases in READERS.items() for case in cases]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def written(folder: Path) -> dict[str, Result]:
    """What rank 0 of each writer returns, by writer, stage and precision."""
    found = {}
    for writer, runs in WRITERS.items():
        results = run_ranks("tests.training.toy_reshard:write", str(folder), writer, ranks=int(writer[0]))[0]
        found.update(
            {f"{writer} {stage} {precision}": each for (stage, precision), each in zip(runs, results, strict=True)}
        )
    return found


@pytest.fixture(scope="module")
def gone_on(folder: Path, written: dict[str, Result]) -> dict[str, list[Result]]:
    """What the ranks of each reader return, by the folder in which they went on."""
    found = {}
    for reader, cases in READERS.items():
        names = [f"{writer} {before} 32-true to {reader} {after}" for writer, before, after in cases]
        names += ["2 ranks 1 bf16-mixed to 1 rank 1"] if reader == "1 rank" else []
        for name in names:
            shutil.copytree(folder / name.partition(" to ")[0], folder / name)
        ranks = run_ranks("tests.training.toy_reshard:read", str(folder), reader, ranks=int(reader[0]))
        found.update({name: [rank[index] for rank in ranks] for index, name in enumerate(names)})
    return found


@pytest.fixture(scope="module")
def one() -> Result:
    return train(settings(module=MODULE))


@pytest.mark.parametrize(("reader", "writer", "before", "after"), CASES)
def test_the_state_is_bitwise_what_others_wrote(
    written: dict[str, Result], gone_on: dict[str, list[Result]], reader: str, writer: str, before: int, after: int
) -> None:
    expected = written[f"{writer} {before} 32-true"]
    for result in gone_on[f"{writer} {before} 32-true to {reader} {after}"]:
        assert result["start"].keys() == expected["end"].keys()
        assert [key for key, value in expected["end"].items() if not torch.equal(result["start"][key], value)] == []
    assert expected["end"]["steps"].tolist() == [STOP]


@pytest.mark.parametrize(("reader", "writer", "before", "after"), CASES)
def test_they_go_on_as_one_process_would(
    written: dict[str, Result],
    gone_on: dict[str, list[Result]],
    one: Result,
    reader: str,
    writer: str,
    before: int,
    after: int,
) -> None:
    for result in gone_on[f"{writer} {before} 32-true to {reader} {after}"]:
        points = written[f"{writer} {before} 32-true"]["points"] + result["points"]
        assert len(points) == STEPS
        for point, wanted in zip(points, one["points"], strict=True):
            assert point["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-6)
            assert point["train/grad_norm"] == pytest.approx(wanted["train/grad_norm"], rel=1e-5)
            assert point["train/lr"] == wanted["train/lr"]
        for name, weight in one["weights"].items():
            torch.testing.assert_close(result["end"][name], weight, rtol=0, atol=3e-6)
        for name, bias in one["biases"][-1].items():
            assert torch.equal(result["end"][f"{name} (buffer)"], bias)
        assert result["tokens"] == one["tokens"]


def test_fp32_weights_behind_bfloat16_ones_are_bitwise_too(
    written: dict[str, Result], gone_on: dict[str, list[Result]]
) -> None:
    [result] = gone_on["2 ranks 1 bf16-mixed to 1 rank 1"]
    expected = written["2 ranks 1 bf16-mixed"]["end"]
    assert [key for key, value in expected.items() if not torch.equal(result["start"][key], value)] == []
    assert len(result["points"]) == STEPS - STOP


def test_the_shards_of_bfloat16_weights_make_up_the_fp32_ones(folder: Path, written: dict[str, Result]) -> None:
    newest, _ = checkpoint.newest_valid(folder / "2 ranks 1 bf16-mixed" / "checkpoints")
    assert newest is not None
    state, expected = whole_state(newest / checkpoint.STATE), written["2 ranks 1 bf16-mixed"]["end"]
    weights = [name for name in state if name in expected and name != "frozen"]
    assert len(weights) > 10
    assert [name for name in weights if not torch.equal(state[name], expected[name])] == []


def test_what_the_others_write_is_a_checkpoint_of_their_own(folder: Path, gone_on: dict[str, list[Result]]) -> None:
    run = folder / "2 ranks 3 32-true to 4 ranks 1" / "checkpoints"
    newest, skipped = checkpoint.newest_valid(run)
    assert skipped == []
    assert newest is not None
    assert checkpoint.layout(newest) == (4, 1)
    assert json.loads((newest / checkpoint.MANIFEST).read_text())["step"] == STEPS
