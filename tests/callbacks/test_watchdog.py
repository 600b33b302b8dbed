"""Oracles: a rank that the test puts to sleep, and standings written by hand."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from ds_lightning.callbacks import Watchdog
from ds_lightning.callbacks.watchdog import Standing, behind, verdict

ROOT = Path(__file__).parents[2]


def standing(hooks: int, collectives: int = 0, phase: str = "forward", step: int = 6) -> Standing:
    return Standing(hooks, collectives, phase, step, "rl/toy.py:33 in score", "node7")


@pytest.mark.parametrize(
    ("standings", "expected"),
    [
        ([standing(5), standing(5), standing(5)], []),
        ([standing(5), standing(4), standing(5)], [1]),
        ([standing(5, 9), standing(5, 8)], [1]),
        ([standing(4, 9), standing(5, 8)], [0]),
        ([standing(3), standing(5), standing(4)], [0, 2]),
        ([standing(3), None], [1]),
    ],
)
def test_behind_are_those_that_the_furthest_wait_for(standings: list[Standing | None], expected: list[int]) -> None:
    assert behind(standings) == expected


def test_the_line_names_rank_machine_place_phase_and_step() -> None:
    standings = [standing(9, phase="backward"), standing(8)]
    assert verdict(standings, [1], 300.0) == (
        "rank 1 of 2 hangs: nothing has moved for 300 s, rank 1 on node7 was last at rl/toy.py:33 in score (forward "
        "of step 7), while others wait in backward of step 7; the run ends, and the same command goes on from the "
        "newest checkpoint"
    )
    assert verdict([standing(9), None, standing(8)], [1, 2], 5.0).startswith(
        "ranks 1, 2 of 3 hang: nothing has moved for 5 s, rank 1 has not begun to train, or is gone; rank 2 on node7"
    )


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan")])
def test_a_time_out_that_is_not_positive_is_refused(timeout: float) -> None:
    with pytest.raises(ValueError, match=rf"^watchdog\.timeout is {timeout}, expected more than 0 seconds or null$"):
        Watchdog(timeout=timeout)


@pytest.mark.parametrize(("timeout", "ranks"), [(None, 2), (5.0, 1)])
def test_nothing_is_watched_where_there_is_nothing_to_watch(timeout: float | None, ranks: int) -> None:
    watchdog = Watchdog(timeout=timeout)
    watchdog.on_train_start(Mock(world_size=ranks), Mock())
    assert watchdog._thread is None
    watchdog.on_fit_end(Mock(), Mock())


def start(folder: Path, stage: int) -> list[subprocess.Popen[str]]:
    """Start two ranks, of which one will hang."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    code = f"from tests.callbacks.toy_faults import hang; hang({str(folder)!r}, {str(stage)!r})"
    torchrun = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **torchrun, **where, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.soak
@pytest.mark.parametrize("stage", [0, 3])
def test_a_rank_that_sleeps_is_named_and_ends_the_run_on_all(tmp_path: Path, stage: int) -> None:
    processes = start(tmp_path, stage)
    try:
        said = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1]
    lines = [line for text in said for line in text.splitlines() if line.startswith("ds-lightning: ")]
    host = socket.gethostname()
    assert len(lines) == 1
    assert lines[0].startswith(
        f"ds-lightning: rank 1 of 2 hangs: nothing has moved for 30 s, rank 1 on {host} was last at callbacks/toy_fau"
    )
    assert "in training_step (forward of step 3), while others wait in forward of step 3;" in lines[0]
    assert lines[0] in said[0]
    assert "in training_step" in said[1], "the stack of the rank that hangs"
