"""Resumed runs against runs that were never interrupted.

The oracle is the straight run of the same toy: weights, optimizer, schedule, loops, the states of callbacks and random
generators, the loss of every micro-batch, the steps at which validation ran, and the points that reached the logger,
compared with ``==``. Here runs are interrupted by an exception that leaves on disk what SIGKILL leaves;
``test_preemption.py`` has the signals and real kills. A disk that is full is a limit on the size of files.
"""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from ds_lightning.callbacks.checkpoints import Checkpoints
from ds_lightning.callbacks.cost_ledger import CostLedger
from ds_lightning.training import checkpoint
from tests.callbacks.toy_run import NUM_STEPS, At, Killed, Run, departures, differences, kill, stop

ALL_VALIDATED = [0, 4, 8, 12]  # 0 is the sanity check


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    return {accumulate: Run(tmp_path_factory.mktemp("straight"), accumulate=accumulate) for accumulate in (1, 4)}


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(
    ("micro_step", "every_n_steps", "started_from"),
    [
        (7.5, 3, 6),  # nothing due at the checkpoint
        (4.0, 4, 4),  # a validation at the checkpoint, over when it was written
        (11.75, 5, 10),
        (7.0, 1, 7),
    ],
)
def test_a_killed_run_resumes_bitwise(
    tmp_path: Path, straight: dict[int, Run], accumulate: int, micro_step: float, every_n_steps: int, started_from: int
) -> None:
    at = At(kill, micro_batch=int(micro_step * accumulate))
    checkpoints = [Checkpoints(every_n_steps=every_n_steps) for _ in range(2)]
    first = Run(tmp_path, at, accumulate=accumulate, checkpoints=checkpoints[0])
    assert first.killed
    second = Run(tmp_path, accumulate=accumulate, checkpoints=checkpoints[1], resume=True, seed=1)
    assert second.start == started_from
    assert departures(straight[accumulate], first, second) == {}


def test_a_run_killed_in_a_validation_repeats_it(tmp_path: Path, straight: dict[int, Run]) -> None:
    first = Run(tmp_path, At(kill, validation=8), accumulate=4)
    assert first.killed
    assert first.validated == [0, 4, 8]
    second = Run(tmp_path, accumulate=4, resume=True, seed=1)
    assert second.validated == [8, 12]
    assert departures(straight[4], first, second) == {}


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(
    ("where", "stopped_at", "validated"),
    [
        ({"micro_step": 6.5}, 7, [0, 4]),
        ({"micro_step": 7.5}, 8, [0, 4]),  # the validation due at step 8 is left to the resumed run
        ({"validation": 8}, 8, [0, 4, 8]),  # the running one is finished
        ({"micro_step": 5.0}, 6, [0, 4]),  # a step at which a checkpoint is due anyway
    ],
)
def test_a_stopped_run_resumes_bitwise(
    tmp_path: Path,
    straight: dict[int, Run],
    accumulate: int,
    where: dict[str, Any],
    stopped_at: int,
    validated: list[int],
) -> None:
    if "micro_step" in where:
        where = {"micro_batch": int(where["micro_step"] * accumulate)}
    first = Run(tmp_path, At(stop, **where), accumulate=accumulate)
    assert first.checkpoints.stopped
    assert first.trainer.global_step == first.saved_steps[-1] == stopped_at
    assert first.validated == validated
    second = Run(tmp_path, accumulate=accumulate, resume=True, seed=1)
    assert not second.checkpoints.stopped
    assert departures(straight[accumulate], first, second) == {}
    assert first.points + second.points == straight[accumulate].points
    assert first.validated + second.validated == ALL_VALIDATED


def test_stopping_and_resuming_again_and_again_is_bitwise(tmp_path: Path, straight: dict[int, Run]) -> None:
    attempts = [
        Run(tmp_path, At(stop, micro_batch=micro_batch), resume=micro_batch > 1, seed=micro_batch - 1)
        for micro_batch in (1, 3, 4, 7, 11)
    ]
    assert [run.checkpoints.stopped for run in attempts] == [True, True, True, True, False]
    assert [point for run in attempts for point in run.points] == straight[1].points
    assert [step for run in attempts for step in run.validated] == ALL_VALIDATED
    assert differences(straight[1].final_state(), attempts[-1].final_state()) == []


def test_a_stop_asked_for_in_the_last_step_changes_nothing(tmp_path: Path, straight: dict[int, Run]) -> None:
    run = Run(tmp_path, At(stop, micro_batch=11))
    assert not run.checkpoints.stopped
    assert run.points == straight[1].points
    assert run.validated == ALL_VALIDATED


@pytest.mark.parametrize(
    ("action", "where", "resumed_at"),
    [
        (stop, {"validation": 4}, 5),  # the validation at micro-batch 18 of 4 x 4 + 2: stops at the next step
        (stop, {"micro_batch": 11}, 3),  # a validation due in the step after
        (kill, {"micro_batch": 30}, 6),
    ],
)
def test_validations_in_mid_accumulation_are_neither_lost_nor_repeated(
    tmp_path: Path, action: Any, where: dict[str, int], resumed_at: int
) -> None:
    whole = Run(tmp_path / "whole", accumulate=4, validate_every=6)
    first = Run(tmp_path / "parts", At(action, **where), accumulate=4, validate_every=6)
    second = Run(tmp_path / "parts", accumulate=4, validate_every=6, resume=True, seed=1)
    assert second.start == resumed_at
    assert departures(whole, first, second) == {}


@pytest.mark.parametrize("step", [5, 6])
def test_a_run_that_another_callback_ends_early_can_go_on(tmp_path: Path, straight: dict[int, Run], step: int) -> None:
    class End(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == step

        def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, state: dict[str, Any]) -> None:
            saves.append(trainer.global_step)

    saves: list[int] = []
    first = Run(tmp_path, End())
    assert first.validated == [0, 4, step]  # Lightning validates when it is told to stop
    assert saves == [3, step]
    second = Run(tmp_path, resume=True, seed=1)
    points = straight[1].points
    again = [point for point in first.points if point[:2] == ("train/loss", step - 1)]  # a kill would have lost it
    assert len(again) == 1
    assert second.points == again + [point for point in points if (point[1] or 0) >= step]
    assert differences(straight[1].module.state_dict(), second.module.state_dict()) == []


def test_a_minimum_of_steps_does_not_hold_up_a_stop(tmp_path: Path) -> None:
    run = Run(tmp_path, At(stop, micro_batch=2), min_steps=10)
    assert run.trainer.global_step == 3


def test_a_finished_run_is_saved_and_resuming_it_does_nothing(tmp_path: Path) -> None:
    first = Run(tmp_path)
    assert first.saved_steps == [9, 12]
    before = first.final_state()
    second = Run(tmp_path, resume=True, seed=1)
    assert second.losses == {}
    assert second.points == []
    assert differences(first.module.state_dict(), second.module.state_dict()) == []
    assert differences(before, second.final_state()) == []


def test_saves_happen_at_optimizer_steps_only_and_the_last_ones_are_kept(
    tmp_path: Path, straight: dict[int, Run]
) -> None:
    class Record(Callback):
        def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, state: dict[str, Any]) -> None:
            saves.append((trainer.global_step, int(pl_module.count)))

    saves: list[tuple[int, int]] = []
    run = Run(tmp_path, Record(), accumulate=4, checkpoints=Checkpoints(every_n_steps=5, keep_last=3))
    assert saves == [(5, 20), (10, 40), (12, 48)]
    assert run.saved_steps == [5, 10, 12]
    assert straight[4].saved_steps == [9, 12]


def test_seconds_may_set_the_interval(tmp_path: Path) -> None:
    often = Run(tmp_path / "often", checkpoints=Checkpoints(every_n_seconds=1e-9, keep_last=20))
    assert often.saved_steps == list(range(1, NUM_STEPS + 1))
    seldom = Run(tmp_path / "seldom", checkpoints=Checkpoints(every_n_seconds=1e9))
    assert seldom.saved_steps == [NUM_STEPS]


def test_the_manifest_has_the_tokens_of_the_completed_steps(straight: dict[int, Run]) -> None:
    assert checkpoint.verify(straight[4].newest).tokens == straight[4].module.tokens_seen == NUM_STEPS * 4 * 16


def test_a_checkpoint_loads_without_unpickling_code(straight: dict[int, Run]) -> None:
    assert "state_dict" in torch.load(straight[1].newest / checkpoint.STATE, weights_only=True)


@contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class DiskFull(Callback):
    """Full from the training step of one micro-batch to that of another."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.limit = files_limited_to(1000)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            self.limit.__enter__()
        elif batch_idx == self.last:
            self.limit.__exit__(None, None, None)


def test_a_full_disk_costs_a_line_and_not_the_run(
    tmp_path: Path, straight: dict[int, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, DiskFull(4, 10))
    lines = [line for line in capsys.readouterr().err.splitlines() if "checkpoint" in line and "not written" in line]
    assert lines == [
        f"checkpoint of step {step} not written, training goes on: [Errno 27] File too large" for step in (6, 9)
    ]
    assert run.checkpoints.failed_saves == 2
    assert run.saved_steps == [3, 12]
    assert run.losses == straight[1].losses


def test_a_full_disk_at_the_end_fails_the_run_and_spares_the_old_checkpoint(
    tmp_path: Path, straight: dict[int, Run]
) -> None:
    with files_limited_to(resource.RLIM_INFINITY), pytest.raises(OSError, match="File too large"):
        Run(tmp_path, DiskFull(8, 99))
    folder = tmp_path / "checkpoints"
    assert checkpoint.newest_valid(folder) == (folder / "step-00000006", [])
    assert not list(folder.glob("*.tmp"))


def test_a_folder_that_cannot_be_written_costs_a_line_and_the_end_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(FileExistsError, match="checkpoints"):
        Run(tmp_path)
    assert "checkpoint of step 3 not written, training goes on: [Errno 17] File exists" in capsys.readouterr().err


def test_an_old_checkpoint_that_cannot_be_deleted_costs_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    run = Run(tmp_path, checkpoints=Checkpoints(every_n_steps=5, keep_last=2))
    assert "old checkpoints not deleted: [Errno 13] Permission denied" in capsys.readouterr().err
    assert run.checkpoints.failed_saves == 0


def test_saving_is_booked_by_a_callback_that_books_phases(tmp_path: Path) -> None:
    class Book(Callback):
        @contextmanager
        def phase(self, name: str) -> Iterator[None]:
            entries.append((name, "enter"))
            yield
            entries.append((name, [path.name for path in (tmp_path / "checkpoints").iterdir()]))

    entries: list[tuple[str, Any]] = []
    Run(tmp_path, Book(), checkpoints=Checkpoints(every_n_steps=99))
    assert entries == [("checkpoint", "enter"), ("checkpoint", ["step-00000012"])]


def test_the_ledger_books_saving_as_checkpoint(tmp_path: Path) -> None:
    ledger = CostLedger(usd_per_device_hour=1.0)
    Run(tmp_path, ledger)
    assert ledger.ledger is not None
    ledger.ledger.close()
    records = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert sum(record["seconds"].get("checkpoint", 0) for record in records) > 0


def test_an_exception_in_a_save_leaves_no_temporary_folder(tmp_path: Path) -> None:
    class Fail(Callback):
        def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, state: dict[str, Any]) -> None:
            raise Killed

    assert Run(tmp_path, Fail()).killed
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "every_n_steps is None and every_n_seconds is None, expected exactly one"),
        (
            {"every_n_steps": 1, "every_n_seconds": 1.0},
            "every_n_steps is 1 and every_n_seconds is 1.0, expected exactly",
        ),
        ({"every_n_steps": 0}, "every_n_steps is 0, expected more than 0"),
        ({"every_n_seconds": -1.0}, r"every_n_seconds is -1\.0, expected more than 0"),
        ({"every_n_steps": 1, "keep_last": 0}, "keep_last is 0, expected at least 1"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Checkpoints(**arguments)
