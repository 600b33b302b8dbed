"""The real command on two ranks that go wrong, as a shell sees it; the oracle is the fault that the test makes."""

from pathlib import Path
from typing import Any

import pytest

from ds_lightning.training import checkpoint
from tests.e2e.command import NUM_STEPS, Run, config

pytestmark = pytest.mark.soak


def lines(run: Run) -> list[str]:
    """Return what the latest attempt complained of."""
    return [line for line in run.attempts[-1].err.splitlines() if line.startswith("ds-lightning: ")]


def test_a_rank_that_is_stopped_is_named_and_the_run_goes_on_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(folder, config(trainer__devices=2, trainer__strategy="ddp", watchdog__timeout=30.0), "stopped")
    monkeypatch.setenv("INTERRUPT_RANK", "1")
    run.attempt("SIGSTOP micro_batch 15", status=1)
    (line,) = lines(run)
    assert line.startswith("ds-lightning: rank 1 of 2 hangs: nothing has moved for 30 s, rank 1 on ")
    assert "of step 8; the run ends, and the same command goes on from the newest checkpoint" in line
    assert run.checkpoints() == ["step-00000003", "step-00000006"]
    assert run.ledger()["chain"] == "ok"
    assert run.attempt().attempts[-1].started_from == 6
    assert run.checkpoints()[-1] == f"step-{NUM_STEPS:08d}"
    assert list(run.out.glob("rank-*")) == []


@pytest.mark.parametrize("strategy", ["ddp", {"class_path": "ds_lightning.training.ZeRO", "init_args": {"stage": 2}}])
def test_a_run_that_skips_all_its_steps_ends_with_status_1(folder: Path, strategy: Any) -> None:
    wild = {"model__init_args__lr": 1e30, "skip_steps__end_after": 4, "samples__every_n_steps": 99}
    run = Run(folder, config(trainer__devices=2, trainer__strategy=strategy, **wild), f"wild-{len(str(strategy))}")
    run.attempt(status=1)
    (line,) = lines(run)
    assert "4 steps in a row were skipped as not finite, expected fewer than skip_steps.end_after (4)" in line
    newest, skipped = checkpoint.newest_valid(run.out / "checkpoints")
    assert newest is not None
    assert skipped == []
    assert run.ledger()["chain"] == "ok"
