"""Runs of the real command that Ctrl-C in a terminal ends before their last step.

Ctrl-C is a SIGINT to every process of the session, workers that read ahead included, as a terminal sends it.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ds_lightning.training import checkpoint
from tests.callbacks.toy_run import differences
from tests.e2e.command import Run, config, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def straight(folder: Path) -> Run:
    return Run(folder, config(), "straight", warm=True).attempt()


def _wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def _in_training(folder: Path, name: str, sleep: float) -> "tuple[Run, subprocess.Popen[str]]":
    """Start a run that sleeps in a micro-batch after its first save, and wait for the save."""
    run = Run(folder, config(data__init_args__num_workers=2, checkpoints__every_n_steps=1), name)
    process = start(folder, *run.command(), SLEEP=str(sleep), SLEEP_AT="4")
    _wait_for(run.out / "checkpoints" / "step-00000002", process)
    time.sleep(0.5)
    return run, process


def test_one_ctrl_c_stops_with_a_checkpoint_and_goes_on_from_it(folder: Path, straight: Run) -> None:
    run, process = _in_training(folder, "once", sleep=2)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "stopped early; the same command goes on from once"
    newest, skipped = checkpoint.newest_valid(run.out / "checkpoints")
    assert (newest, skipped) == (run.out / "checkpoints" / "step-00000003", [])
    assert run.attempt().attempts[-1].started_from == 3
    assert differences(run.exported(), straight.exported()) == []
    assert run.logged() == straight.logged()


def test_a_second_ctrl_c_ends_the_run_at_once_in_one_line(folder: Path) -> None:
    run, process = _in_training(folder, "twice", sleep=60)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode == 1
    assert "Traceback" not in out + err
    assert err.splitlines() == ["interrupted: the same command goes on from the newest checkpoint"]
    newest, skipped = checkpoint.newest_valid(run.out / "checkpoints")
    assert (newest, skipped) == (run.out / "checkpoints" / "step-00000002", [])
    assert run.ledger()["chain"] == "ok"
