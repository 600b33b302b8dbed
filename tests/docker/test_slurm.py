"""The batch script under stand-ins for Slurm's two programs. The oracle is Slurm's documentation of what they get."""

import os
import subprocess
from pathlib import Path

import pytest

from ds_lightning.cli import DONE, FAILED, STOPPED, WRONG_INPUT
from tests.docker.test_templates import DOCKER, parsed, stand_in

OPTIONS = ["--config", "configs/pretrain/small.yaml", "--config", "configs/trainer/ddp8.yaml"]
CHECKPOINT = 'mkdir -p "$RUN/checkpoints/step-00000020"'
REPORT = 'date +%N > "$RUN/report.json"'


def batch(folder: Path, does: str, status: int) -> tuple[int, str, list[str]]:
    """Run the script with an srun that does what it is told. Return status, what was requeued, srun's arguments."""
    programs, run = folder / "bin", folder / "run"
    programs.mkdir(exist_ok=True)
    stand_in(programs, "srun", f'printf "%s\\n" "$@" > "$CALLED"\n{does}\nexit {status}')
    stand_in(programs, "scontrol", 'echo "$@"')
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "RUN": str(run), "CALLED": str(folder / "called")}
    environment |= {"SLURM_JOB_ID": "42", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}
    command: list[str | Path] = [DOCKER / "slurm/fit.sbatch", run, *OPTIONS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout.strip(), (folder / "called").read_text().split()


def test_every_gpu_of_the_job_is_the_trainers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, called = batch(tmp_path, "", DONE)
    assert called[:4] == ["--kill-on-bad-exit=0", "--wait=120", ".venv/bin/ds-lightning", "fit"]
    config = parsed(called[4:], monkeypatch, capsys)
    assert (config["trainer"]["num_nodes"], int(config["trainer"]["devices"])) == (2, 8)
    assert config["out"] == str(tmp_path / "run")


def test_a_stop_with_a_new_checkpoint_goes_back_to_the_queue(tmp_path: Path) -> None:
    status, requeued, _ = batch(tmp_path, CHECKPOINT, STOPPED)
    assert (status, requeued) == (0, "requeue 42")


def test_the_end_of_a_budget_is_the_end(tmp_path: Path) -> None:
    assert batch(tmp_path, f"{CHECKPOINT}\n{REPORT}", STOPPED)[:2] == (STOPPED, "")


def test_the_report_of_an_earlier_end_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/report.json").write_text("{}")
    assert batch(tmp_path, CHECKPOINT, STOPPED)[:2] == (0, "requeue 42")


def test_an_attempt_that_saved_nothing_is_not_repeated(tmp_path: Path) -> None:
    batch(tmp_path, CHECKPOINT, STOPPED)
    assert batch(tmp_path, CHECKPOINT, STOPPED)[:2] == (STOPPED, "")
    assert batch(tmp_path, 'mkdir -p "$RUN/checkpoints/step-00000030.tmp"', STOPPED)[:2] == (STOPPED, "")


@pytest.mark.parametrize("status", [DONE, FAILED, WRONG_INPUT, 137])
def test_any_other_status_is_that_of_the_job(tmp_path: Path, status: int) -> None:
    assert batch(tmp_path, CHECKPOINT, status)[:2] == (status, "")


def test_a_job_without_a_folder_says_what_it_expects() -> None:
    done = subprocess.run([DOCKER / "slurm/fit.sbatch"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "expected the folder of the run, then options of ds-lightning fit" in done.stderr
