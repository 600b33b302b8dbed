"""Runs of the real command under a budget. The oracles are the budget, and a clock outside of the process.

Budgets are in seconds of this machine, so they begin where a run that does next to nothing ends.
"""

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ds_lightning.cost import ledger_report
from ds_lightning.cost.ledger import FLUSH_SECONDS
from ds_lightning.training import checkpoint
from tests.e2e.command import Attempt, Run, config, start

# The exit of a process takes the kernel up to 0.1 s that no process can book, and its start as long.
UNBOOKED = 0.3


@pytest.fixture(scope="module")
def least(folder: Path) -> float:
    """Seconds of a run from start to end that trains a dozen steps."""
    Run(folder, config(), "first").attempt()  # prepares the corpus
    return Run(folder, config(), "least").attempt().attempts[0].seconds


def _settings(seconds: float, **overrides: Any) -> dict[str, Any]:
    return config(
        model__init_args__total_tokens=10**8,
        budget__hours=seconds / 3600,
        trainer__val_check_interval=200,
        trainer__limit_val_batches=2,
        **overrides,
    )


@pytest.mark.slow
@pytest.mark.parametrize("more", [9, *(pytest.param(more, marks=pytest.mark.soak) for more in (14, 22))])
def test_a_run_ends_just_below_its_budget_with_all_that_a_run_ends_with(
    folder: Path, least: float, more: float
) -> None:
    seconds = least + more
    run = Run(folder, _settings(seconds), f"budget-{more}").attempt(status=3)
    spent = run.ledger()["wall_seconds"]
    print(f"budget {seconds:.2f} s: spent {spent:.2f} s, {run.attempts[0].seconds:.2f} s outside")
    assert seconds - max(0.01 * seconds, FLUSH_SECONDS) <= spent <= seconds
    assert run.attempts[0].seconds <= seconds + UNBOOKED
    rates = list(run.logged()["train/lr"].values())
    assert max(rates) > 3e-3
    assert rates[-1] == pytest.approx(0, abs=1e-12), "the final value"
    newest, skipped = checkpoint.newest_valid(run.out / "checkpoints")
    assert newest is not None
    assert skipped == []
    [stage] = json.loads((run.out / "report.json").read_text(encoding="utf-8"))["stages"]
    assert stage["tokens"] == checkpoint.verify(newest).tokens == run.state()["tokens_seen"]
    assert 0 < stage["tokens"] < 10**8
    assert stage["budget"] == {"hours": seconds / 3600}
    assert 0 < stage["val_loss"] < 6
    assert (run.out / "weights" / "model.safetensors").is_file()
    again = run.attempt(status=0)  # nothing is left to do
    assert again.ledger()["wall_seconds"] == spent


def _killed(run: Run, delay: float) -> Attempt | None:
    """Make an attempt and kill it after so many seconds; none: it was."""
    process = start(run.folder, *run.command())
    try:
        out, err = process.communicate(timeout=delay)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None
    return Attempt(process.returncode, delay, delay, out, err)


@pytest.mark.soak
def test_killed_twenty_times_all_attempts_together_cost_no_more(folder: Path, least: float) -> None:
    kills = 20
    draw = random.Random(kills)
    seconds = 10 * least  # so that the money is gone before the kills are
    run = Run(folder, _settings(seconds, checkpoints__every_n_steps=10), "killed")
    spent = 0.0
    for _ in range(kills):
        ended = _killed(run, draw.uniform(0.4 * least, 1.5 * least))
        if (run.out / "ledger.jsonl").is_file():
            before, spent = spent, ledger_report(run.out)["wall_seconds"]
            assert before <= spent <= seconds + FLUSH_SECONDS
        assert ended is None or ended.status in (0, 3), ended.err
    last = start(run.folder, *run.command())
    _, err = last.communicate(timeout=300)
    assert last.returncode in (0, 3), err
    assert "Traceback" not in err
    ledger = ledger_report(run.out)
    print(f"{kills} kills, budget {seconds:.2f} s: {ledger['wall_seconds']:.2f} s in {ledger['attempts']} attempts")
    assert ledger["wall_seconds"] <= seconds + FLUSH_SECONDS
    newest, _ = checkpoint.newest_valid(run.out / "checkpoints")
    assert newest is not None
