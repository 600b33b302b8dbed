"""Two processes of one machine, started by Lightning and by the batch script under a stand-in for Slurm, and stopped.

The oracle is the same run on two processes that nobody stops: the final weights and the state, bitwise.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.e2e.command import ROOT, Run, config

SRUN = """#!/usr/bin/env bash
# Starts the two tasks of a job on one node, and ends with the highest of their statuses.
while [ "$1" != fit ]; do shift; done
status=0
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 "$PYTHON" -m ds_lightning "$@" &
  tasks[rank]=$!
done
for task in "${tasks[@]}"; do
  wait "$task" || { found=$?; [ "$found" -le "$status" ] || status=$found; }
done
exit "$status"
"""


def settings() -> dict[str, object]:
    return config(trainer__devices=2, trainer__strategy="ddp")


def job(run: Run, interrupt: str | None = None) -> tuple[int, str]:
    """Run the batch script for a run; return its status, and what it said to the queue."""
    programs = run.folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, script in (("srun", SRUN), ("scontrol", '#!/usr/bin/env bash\necho "$@"\n')):
        (programs / name).write_text(script, encoding="ascii")
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHON": sys.executable}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"SLURM_JOB_ID": f"{os.getpid()}", "SLURM_JOB_NAME": "fit", "SLURM_NODELIST": "localhost"}
    environment |= {"SLURM_NNODES": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    environment |= {"INTERRUPT": interrupt} if interrupt else {}
    command: list[str | Path] = [ROOT / "docker/slurm/fit.sbatch", run.name, "--config", f"{run.name}.yaml"]
    done = subprocess.run(command, cwd=run.folder, env=environment, capture_output=True, text=True, timeout=300)
    said = [line for line in done.stdout.splitlines() if line.startswith("requeue")]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.returncode, "".join(said)


@pytest.mark.soak
def test_a_run_stopped_on_the_desk_and_in_the_queue_ends_with_the_same_bits(folder: Path) -> None:
    straight = Run(folder, settings(), "straight").attempt()
    stopped = Run(folder, settings(), "stopped").attempt("SIGTERM micro_batch 7", status=3)
    assert stopped.checkpoints()[-1] == "step-00000004"
    assert stopped.attempts[0].err.count("stopped early; the same command goes on") == 1
    assert job(stopped, "SIGUSR1 micro_batch 17") == (0, f"requeue {os.getpid()}")
    assert stopped.checkpoints()[-1] == "step-00000009"
    assert job(stopped) == (0, "")
    weights, expected = stopped.exported(), straight.exported()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    ledger = stopped.ledger()
    assert ledger["attempts"] == 3
    assert ledger["device_hours"] == pytest.approx(2 * ledger["wall_seconds"] / 3600)
