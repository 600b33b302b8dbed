"""The real command on two ranks under ZeRO, killed and stopped and started again, against the run left alone.

The oracle is the run left alone: curves in the TensorBoard files and exported weights, compared bitwise. What the
export holds is checked against the shards of the last checkpoint by the tests of checkpoints.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.toy_run import differences
from tests.e2e.command import NUM_STEPS, Run, config

pytestmark = pytest.mark.soak

STAGES = (2, 3)
MODULE = {"model__init_args__eps": 1e-3}
"""AdamW's step in a gradient next to zero is then no toss of a coin that rounding decides."""


def zero(stage: int, **changes: Any) -> dict[str, Any]:
    """Return a run of two ranks."""
    settings = config(trainer__devices=2, trainer__precision="32-true", **MODULE, **changes)
    settings["trainer"]["strategy"] = {"class_path": "ds_lightning.training.ZeRO", "init_args": {"stage": stage}}
    return settings


@pytest.fixture(scope="module")
def straight(folder: Path) -> dict[int, Run]:
    return {stage: Run(folder, zero(stage), f"straight{stage}").attempt() for stage in STAGES}


def test_a_run_on_two_ranks_is_as_complete_as_one_on_one(folder: Path, straight: dict[int, Run]) -> None:
    one = Run(folder, config(**MODULE), "one").attempt()
    for run in straight.values():
        assert run.checkpoints() == one.checkpoints()
        logged, expected = run.logged(), one.logged()
        assert logged.keys() == expected.keys()
        for tag in ("train/loss", "val/loss"):
            assert logged[tag].keys() == expected[tag].keys()
            # The same batches and weights but for the order of sums: fp32 rounding over twelve steps of AdamW.
            assert logged[tag] == {step: pytest.approx(value, rel=1e-5) for step, value in expected[tag].items()}
        assert run.exported().keys() == one.exported().keys()
        report = json.loads((run.out / "report.json").read_text())
        assert report["stages"][0]["tokens"] == NUM_STEPS * 8 * 64
        assert report["ledger"]["chain"] == "ok"


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_but_results_is_printed(straight: dict[int, Run], stage: int) -> None:
    attempt = straight[stage].attempts[0]
    assert attempt.out.count("report: ") == 1, "one rank speaks for all"
    noise = [line for line in (attempt.out + attempt.err).splitlines() if "deepspeed" in line.lower()]
    assert noise == []
    assert "Warning" not in attempt.err


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_run_is_bitwise_the_run_left_alone(
    folder: Path, straight: dict[int, Run], monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    run = Run(folder, zero(stage), f"killed{stage}")
    run.attempt("SIGKILL save 6", status=-9)
    monkeypatch.setenv("INTERRUPT_RANK", "1")
    run.attempt("SIGTERM micro_batch 15", status=3)
    run.attempt()
    assert [attempt.started_from for attempt in run.attempts] == [0, 3, 8]
    assert run.logged() == straight[stage].logged()
    assert differences(run.exported(), straight[stage].exported()) == []
    assert run.ledger()["chain"] == "ok"


def test_a_killed_run_goes_on_with_one_device_and_says_so(folder: Path, straight: dict[int, Run]) -> None:
    killed = Run(folder, zero(2), "fewer").attempt("SIGKILL micro_batch 15", status=-9)
    for changes, status, found in (
        ({"devices": 3}, 2, "batch_size is 8 rows, expected a multiple of 3 ranks times accumulate_grad_batches 2"),
        ({"strategy": "auto"}, 2, "holds 2 shards of ZeRO stage 2, this run has a state that is not sharded"),
        ({"devices": 1}, 0, "2 shards of ZeRO stage 2 become 1 shard of ZeRO stage 2"),
    ):
        run = Run(folder, {**killed.settings, "trainer": {**killed.settings["trainer"], **changes}}, "fewer")
        attempt = run.attempt(status=status).attempts[0]
        assert len([line for line in attempt.err.splitlines() if found in line]) == 1, attempt.err
        assert status == 0 or attempt.err.count("ds-lightning: ") == 1, attempt.err
    assert attempt.started_from == 6
    logged, expected = run.logged(), straight[2].logged()
    for tag in ("train/loss", "val/loss"):
        # The same batches, weights and states but for the order of sums: fp32 rounding over six steps of AdamW.
        assert logged[tag] == {step: pytest.approx(value, rel=1e-5) for step, value in expected[tag].items()}
    ledger = run.ledger()
    assert ledger["chain"] == "ok"


def test_what_a_finished_run_left_can_be_validated_and_exported(folder: Path, straight: dict[int, Run]) -> None:
    import ds_lightning.cli

    run = straight[3]
    assert ds_lightning.cli.main(["export", str(run.out), str(folder / "hf"), "--tokenizer", _tokenizer(folder)]) == 0
    from safetensors.torch import load_file

    exported = load_file(folder / "hf" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in run.exported().items())


def _tokenizer(folder: Path) -> str:
    return str(folder / "prepared" / "tokenizer.json")
