"""Signals and kills against runs that were never interrupted.

The oracle is the same as in ``test_checkpoints.py``. SIGKILL needs a process to kill: this file is the program too.
On two ranks each draws numbers of its own, so that what it did can be told from what the other did.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ds_lightning.callbacks.checkpoints import Checkpoints
from ds_lightning.callbacks.preemption import Preemption
from ds_lightning.training import checkpoint
from tests.callbacks.toy_run import At, Run, departures, kill, send, stop
from tests.callbacks.toy_signals import PLACES
from tests.training.ranks import run_ranks

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("straight"), Preemption(), accumulate=4)


@pytest.fixture(autouse=True)
def _handlers_are_put_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in HANDLED]
    yield
    after = [signal.getsignal(number) for number in HANDLED]
    for number, handler in zip(HANDLED, before, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_in_mid_accumulation_stops_at_the_step_and_resumes_bitwise(
    tmp_path: Path, straight: Run, number: signal.Signals
) -> None:
    preemption = Preemption()
    first = Run(tmp_path, preemption, At(send(number), micro_batch=4 * 6 + 1), accumulate=4)
    assert preemption.preempted
    assert first.trainer.global_step == 7
    second = Run(tmp_path, Preemption(), accumulate=4, resume=True, seed=1)
    assert departures(straight, first, second) == {}
    assert first.points + second.points == straight.points


def test_a_signal_in_a_validation_waits_for_its_end(tmp_path: Path, straight: Run) -> None:
    preemption = Preemption()
    first = Run(tmp_path, preemption, At(send(signal.SIGTERM), validation=4), accumulate=4)
    assert preemption.preempted
    assert first.trainer.global_step == 4
    second = Run(tmp_path, Preemption(), accumulate=4, resume=True, seed=1)
    assert first.validated + second.validated == straight.validated
    assert departures(straight, first, second) == {}


def test_a_signal_in_a_save_stops_at_the_next_step(tmp_path: Path, straight: Run) -> None:
    class Send(Preemption):
        def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, state: dict[str, Any]) -> None:
            if trainer.global_step == 6:
                os.kill(os.getpid(), signal.SIGUSR1)

    preemption = Send()
    first = Run(tmp_path, preemption, accumulate=4)
    assert preemption.preempted
    assert first.saved_steps == [6, 7]
    second = Run(tmp_path, Preemption(), accumulate=4, resume=True, seed=1)
    assert departures(straight, first, second) == {}


def test_a_signal_in_a_backward_pass_waits_for_the_step(tmp_path: Path, straight: Run) -> None:
    class InBackward(Callback):
        def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
            if trainer.fit_loop.epoch_loop.batch_idx == 4 * 6 + 1:
                loss.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGTERM))

    preemption = Preemption()
    first = Run(tmp_path, preemption, InBackward(), accumulate=4)
    assert preemption.preempted
    assert first.trainer.global_step == 7
    second = Run(tmp_path, Preemption(), accumulate=4, resume=True, seed=1)
    assert departures(straight, first, second) == {}


def test_a_signal_in_the_sanity_check_waits_for_the_first_step(tmp_path: Path, straight: Run) -> None:
    class InSanityCheck(Callback):
        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.sanity_checking:
                os.kill(os.getpid(), signal.SIGTERM)

    preemption = Preemption()
    first = Run(tmp_path, preemption, InSanityCheck(), accumulate=4)
    assert preemption.preempted
    assert first.saved_steps == [1]
    second = Run(tmp_path, Preemption(), accumulate=4, resume=True, seed=1)
    assert departures(straight, first, second) == {}


def test_a_signal_in_the_last_step_lets_the_run_finish(tmp_path: Path, straight: Run) -> None:
    preemption = Preemption()
    run = Run(tmp_path, preemption, At(send(signal.SIGTERM), micro_batch=45), accumulate=4)
    assert not preemption.preempted
    assert run.points == straight.points


def test_a_stop_for_another_reason_is_no_preemption(tmp_path: Path) -> None:
    preemption = Preemption()
    run = Run(tmp_path, preemption, At(stop, micro_batch=3))
    assert run.checkpoints.stopped
    assert not preemption.preempted


def test_a_second_interrupt_ends_the_run_at_once(tmp_path: Path) -> None:
    def twice(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    preemption = Preemption()
    with pytest.raises(SystemExit) as raised:  # what Lightning makes of a KeyboardInterrupt
        Run(tmp_path, preemption, At(twice, micro_batch=4))
    assert isinstance(raised.value.__context__, KeyboardInterrupt)
    assert not preemption.preempted
    folder = tmp_path / "checkpoints"
    assert checkpoint.newest_valid(folder) == (folder / "step-00000003", [])


def test_a_signal_after_another_one_is_no_second_interrupt(tmp_path: Path) -> None:
    def both(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    preemption = Preemption()
    Run(tmp_path, preemption, At(both, micro_batch=4))
    assert preemption.preempted


def test_the_old_handlers_are_back_after_a_run_that_failed(tmp_path: Path) -> None:
    assert Run(tmp_path, Preemption(), At(kill, micro_batch=2)).killed  # the fixture compares


def test_a_fresh_run_forgets_the_signal_of_an_earlier_one(tmp_path: Path) -> None:
    preemption, checkpoints = Preemption(), Checkpoints(every_n_steps=5)
    Run(tmp_path / "a", preemption, At(send(signal.SIGTERM), micro_batch=2), checkpoints=checkpoints)
    assert preemption.preempted
    assert Run(tmp_path / "b", preemption, checkpoints=checkpoints).trainer.global_step == 12
    assert not preemption.preempted


@pytest.mark.parametrize("name", ["SIGNONE", "SIGKILL", "SIG_DFL", "term"])
def test_a_name_that_is_no_signal_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"signals has '{name}', expected names of signals such as SIGTERM"):
        Preemption(signals=["SIGTERM", name])


def test_a_trainer_without_checkpoints_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer\.callbacks has no Checkpoints, expected one"):
        Preemption().setup(Mock(callbacks=[]), Mock(), "fit")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks makes of signals and refused writes."""
    return run_ranks("tests.callbacks.toy_signals:main", str(tmp_path_factory.mktemp("ranks")))


@pytest.mark.soak
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_any_one_rank_stops_all_and_they_resume_bitwise(
    ranks: list[dict[str, Any]], told: int, place: str
) -> None:
    assert ranks[0]["straight"]["drawn"] != ranks[1]["straight"]["drawn"]
    for rank in ranks:
        straight, (preempted, first, second) = rank["straight"], rank["stopped"][f"{told} {place}"]
        assert [straight["error"], first["error"], second["error"]] == [""] * 3
        assert preempted
        assert len(first["drawn"]) == 2 * PLACES[place]
        assert first["drawn"] + second["drawn"] == straight["drawn"]
        assert torch.equal(second["weights"][-1], straight["weights"][-1])


@pytest.mark.soak
def test_a_rank_that_may_not_write_costs_all_of_them_the_same_save(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        result, left = rank["refused for a step"]
        assert result["error"] == ""
        assert left == ["step-00000001", "step-00000003", "step-00000004"]
        assert torch.equal(result["weights"][-1], rank["straight"]["weights"][-1])


@pytest.mark.soak
def test_a_rank_that_may_not_write_at_the_end_fails_all_and_spares_the_old_checkpoint(
    ranks: list[dict[str, Any]],
) -> None:
    (first, left), (second, _) = (rank["refused at the end"] for rank in ranks)
    assert first["error"].startswith("PermissionError: [Errno 13] Permission denied on rank 1: ")
    assert second["error"].startswith("PermissionError: [Errno 13] Permission denied: ")
    assert left == ["step-00000001", "step-00000002", "step-00000003"]


def run_until_killed(folder: Path, scenario: str) -> None:
    """Train in this process and kill it: in the middle of an accumulation, or of a save."""
    if scenario == "accumulation":
        Run(folder, Preemption(), At(send(signal.SIGKILL), micro_batch=4 * 7 + 2), accumulate=4)
    publish = checkpoint.publish

    def cut(temporary: Path, **facts: Any) -> Path:
        if temporary.name == "step-00000009.tmp":
            os.truncate(temporary / checkpoint.STATE, 1000)
            os.kill(os.getpid(), signal.SIGKILL)
        return publish(temporary, **facts)

    checkpoint.publish = cut
    Run(folder, Preemption(), accumulate=4)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {scenario: tmp_path_factory.mktemp(scenario) for scenario in ("accumulation", "save")}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(folder), scenario], env=environment, cwd=folder)
        for scenario, folder in folders.items()
    ]
    assert [process.wait(timeout=120) for process in processes] == [-signal.SIGKILL] * 2
    return folders


@pytest.mark.parametrize("scenario", ["accumulation", "save"])
def test_a_process_killed_in_the_middle_resumes_bitwise(killed: dict[str, Path], straight: Run, scenario: str) -> None:
    left = sorted(path.name for path in (killed[scenario] / "checkpoints").iterdir())
    assert left == ["step-00000003", "step-00000006", *(["step-00000009.tmp"] if scenario == "save" else [])]
    second = Run(killed[scenario], Preemption(), accumulate=4, resume=True, seed=1)
    assert second.start == 6
    assert departures(straight, straight, second) == {}


if __name__ == "__main__":
    run_until_killed(Path(sys.argv[1]), sys.argv[2])
