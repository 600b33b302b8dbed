"""What a process does as one of several.

The oracles: Lightning's observer of the processes that it started, which kills the run if one ends with another status
than 0; and Lightning's own choice of an environment from what Slurm tells.
"""

from typing import Any

import pytest
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch import Trainer

from ds_lightning.training_cli import TrainingCLI
from tests.cli.command_line import CommandLine

FIT = ("fit", "--config", "run.yaml", "--out", "run", "--model.init_args.total_tokens", "4096")


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The trainers of the commands that a test calls; they are interrupted before they begin."""
    made: list[Trainer] = []

    def fit(trainer: Trainer, **arguments: Any) -> None:
        made.append(trainer)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", fit)
    return made


def slurm(monkeypatch: pytest.MonkeyPatch, rank: int = 0, tasks: int = 1) -> None:
    """Tell what srun tells a task."""
    facts = {"PROCID": rank, "LOCALID": rank, "NODEID": 0, "NTASKS": tasks, "NTASKS_PER_NODE": tasks, "JOB_NAME": "fit"}
    for name, value in facts.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


def test_lightning_does_not_requeue_the_job_itself(
    own: CommandLine, trainers: list[Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm(monkeypatch)
    assert own(*FIT).status == 1
    environment = trainers[0]._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue


@pytest.mark.parametrize(
    ("environment", "rank", "status"),
    [(LightningEnvironment, 0, 3), (LightningEnvironment, 1, 0), (TorchElasticEnvironment, 1, 3)],
)
def test_a_process_that_lightning_started_leaves_the_status_to_the_first(
    own: CommandLine,
    trainers: list[Trainer],
    monkeypatch: pytest.MonkeyPatch,
    environment: type[ClusterEnvironment],
    rank: int,
    status: int,
) -> None:
    own(*FIT)
    cli = object.__new__(TrainingCLI)
    cli.exit_status, cli.trainer = 0, trainers[0]
    trainers[0]._accelerator_connector.cluster_environment = environment()
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    cli._stop_early("stopped")
    assert cli.exit_status == status


def test_one_rank_writes_the_weights(
    own: CommandLine, trainers: list[Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[object] = []
    monkeypatch.setattr("ds_lightning.training_cli.save_hf", lambda *arguments, **settings: written.append(arguments))
    own(*FIT)
    cli = object.__new__(TrainingCLI)
    cli.trainer = trainers[0]
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    cli._export(own.folder / "weights")
    assert not written
