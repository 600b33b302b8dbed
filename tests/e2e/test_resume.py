"""Runs of the real command that were killed or stopped and resumed, against one that was left alone.

The oracle is the run left alone: the newest checkpoint (weights, optimizer, routing biases, random state, loops), the
exported weights and the curves in the TensorBoard files, compared bitwise. Every attempt at the run with masks has
another number of processes that read ahead. The oracle of the ledger is a clock outside of the process.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml

from tests.callbacks.toy_run import differences
from tests.e2e.command import NUM_STEPS, SAVE_EVERY, VALIDATE_EVERY, Attempt, Run, config, write_corpus

pytestmark = pytest.mark.slow

# The exit of a process takes the kernel 0.1 to 0.3 s that no process can book: an attempt must last for it to be 1%.
LONG = 6.0


def _killed(folder: Path) -> Run:
    run = Run(folder, config(), "killed", warm=True)
    for place in ("saved 3", "micro_batch 9", "validation 8", "save 9"):
        run.attempt(f"SIGKILL {place}", status=-9, sleep=LONG)
    return run.attempt(sleep=LONG)


def _stopped(folder: Path) -> Run:
    run = Run(folder, config(), "stopped")
    for interrupt in ("SIGTERM micro_batch 9", "SIGTERM validation 8", "SIGINT save 9"):
        run.attempt(interrupt, status=3, sleep=LONG)
    return run.attempt(sleep=LONG)


def _again(folder: Path) -> Run:
    settings = yaml.safe_load((folder / "straight" / "config.yaml").read_text(encoding="utf-8"))
    return Run(folder, settings, "again", warm=True).attempt()


def _masked(folder: Path) -> Run:
    return Run(folder, config(data__init_args__mask_documents=True), "masked", warm=True).attempt()


def _masked_killed(folder: Path) -> Run:
    attempts: list[Attempt] = []
    for workers, interrupt, status in (
        (1, "SIGKILL micro_batch 15", -9),
        (0, "SIGTERM micro_batch 16", 3),
        (2, None, 0),
    ):
        settings = config(data__init_args__mask_documents=True, data__init_args__num_workers=workers)
        run = Run(folder, settings, "masked_killed", warm=True, attempts=attempts)
        run.attempt(interrupt, status=status)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All runs, two at a time after the one that prepares the corpus."""
    folder = tmp_path_factory.mktemp("runs")
    write_corpus(folder / "corpus")
    straight = Run(folder, config(), "straight").attempt()
    with ThreadPoolExecutor(4) as pool:  # two of them sleep most of the time
        jobs = [pool.submit(job, folder) for job in (_killed, _stopped, _again, _masked, _masked_killed)]
        return {run.name: run for run in (straight, *(job.result() for job in jobs))}


def test_the_straight_run_is_one_that_could_differ(runs: dict[str, Run]) -> None:
    straight = runs["straight"]
    state, logged = straight.state(), straight.logged()
    biases = {name: value for name, value in state["state_dict"].items() if name.endswith("e_score_correction_bias")}
    assert len(biases) == 2, "one layer with experts and the block of multi-token prediction"
    assert all(bias.any() for bias in biases.values())
    assert sorted(logged["train/loss"]) == list(range(NUM_STEPS))
    assert len(set(logged["train/loss"].values())) == NUM_STEPS
    assert sorted(logged["val/loss"])[:3] == [step - 1 for step in range(VALIDATE_EVERY, NUM_STEPS + 1, VALIDATE_EVERY)]
    assert state["tokens_seen"] == straight.settings["model"]["init_args"]["total_tokens"]


@pytest.mark.parametrize(
    ("name", "straight", "started_from"),
    [
        ("killed", "straight", [0, 3, 3, 6, 6]),
        ("stopped", "straight", [0, 5, 8, 10]),
        ("masked_killed", "masked", [0, 6, 9]),
    ],
)
def test_an_interrupted_run_is_bitwise_the_run_left_alone(
    runs: dict[str, Run], name: str, straight: str, started_from: list[int]
) -> None:
    run, expected = runs[name], runs[straight]
    assert [attempt.started_from for attempt in run.attempts] == started_from
    assert differences(run.state(), expected.state()) == []
    assert differences(run.exported(), expected.exported()) == []
    assert run.logged() == expected.logged()


def test_a_saved_config_runs_again_to_the_same_bits(runs: dict[str, Run]) -> None:
    run, expected = runs["again"], runs["straight"]
    assert run.settings["checkpoints"]["every_n_steps"] == SAVE_EVERY
    assert differences(run.state(), expected.state()) == []
    assert differences(run.exported(), expected.exported()) == []
    assert run.logged() == expected.logged()


def test_masks_on_documents_are_another_training(runs: dict[str, Run]) -> None:
    assert runs["masked"].logged()["train/loss"] != runs["straight"].logged()["train/loss"]


def test_the_export_holds_the_weights_of_the_last_checkpoint(runs: dict[str, Run]) -> None:
    run = runs["killed"]
    head = run.state()["state_dict"]["model.lm_head.weight"]
    assert torch.equal(run.exported()["lm_head.weight"], head)


@pytest.mark.parametrize("name", ["killed", "stopped"])
def test_the_phases_sum_to_the_wall_clock_of_all_attempts(runs: dict[str, Run], name: str) -> None:
    run, ledger = runs[name], runs[name].ledger()
    measured = [attempt.alive for attempt in run.attempts]
    assert ledger["chain"] == "ok"
    assert len(ledger["attempt_seconds"]) == ledger["attempts"] == len(measured)
    booked = sum(phase["seconds"] for phase in ledger["phases"].values())
    assert booked == pytest.approx(ledger["wall_seconds"], abs=1e-6)
    print(f"{name}: booked {booked:.3f} of {sum(measured):.3f} s; {ledger['attempt_seconds']} of {measured}")
    assert booked == pytest.approx(sum(measured), rel=0.01)
    for seconds, attempt in zip(ledger["attempt_seconds"].values(), run.attempts, strict=True):
        assert seconds == pytest.approx(attempt.alive, abs=0.3), "a few beats, and the start and end of a process"


def test_redone_work_is_lost_and_a_stop_loses_next_to_none(runs: dict[str, Run]) -> None:
    killed, stopped = (runs[name].ledger()["phases"] for name in ("killed", "stopped"))
    assert killed["lost"]["seconds"] == pytest.approx(2 * LONG, abs=5), "two of them saved nothing"
    assert killed["train"]["seconds"] == pytest.approx(3 * LONG, abs=5)
    # Between its save and its end a stopped run still fetches one batch, which the next attempt fetches again.
    assert stopped["lost"]["seconds"] < 0.3
    assert stopped["train"]["seconds"] == pytest.approx(4 * LONG, abs=5)


def test_a_finished_run_trains_no_step_again(runs: dict[str, Run]) -> None:
    run = runs["straight"]
    state, exported, logged, spent = run.state(), run.exported(), run.logged(), run.ledger()
    checkpoints = run.checkpoints()
    assert run.attempt().attempts[-1].started_from == NUM_STEPS
    assert run.checkpoints() == checkpoints
    assert differences(run.state(), state) == []
    assert differences(run.exported(), exported) == []
    assert run.logged()["train/loss"] == logged["train/loss"]
    now = run.ledger()
    assert now["chain"] == "ok"
    assert now["phases"]["train"]["seconds"] == spent["phases"]["train"]["seconds"]
