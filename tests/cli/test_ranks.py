"""What a process does as one of several.

The oracles: Lightning's observer of the processes that it started, which kills the run if one ends with another status
than 0; and Lightning's own choice of an environment from what Slurm tells.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer

from ds_lightning.training_cli import TrainingCLI
from tests.cli.command_line import CommandLine

FIT = ("fit", "--config", "run.yaml", "--out", "another")


@pytest.fixture
def begun(own: CommandLine, monkeypatch: pytest.MonkeyPatch) -> Callable[[], TrainingCLI]:
    """Calls the command and interrupts it where training would begin."""

    def fit(cli: TrainingCLI, **arguments: Any) -> None:
        made.append(cli)
        raise KeyboardInterrupt

    def begin() -> TrainingCLI:
        assert own(*FIT).status == 1
        return made.pop()

    made: list[TrainingCLI] = []
    monkeypatch.setattr(TrainingCLI, "fit", fit)
    return begin


def slurm(monkeypatch: pytest.MonkeyPatch, rank: int = 0, tasks: int = 1) -> None:
    """Tell what srun tells a task."""
    facts = {"PROCID": rank, "LOCALID": rank, "NODEID": 0, "NTASKS": tasks, "NTASKS_PER_NODE": tasks, "JOB_NAME": "fit"}
    for name, value in facts.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


def test_lightning_does_not_requeue_the_job_itself(
    begun: Callable[[], TrainingCLI], monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm(monkeypatch)
    environment = begun().trainer._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue


@pytest.mark.parametrize(
    ("environment", "rank", "status"),
    [(LightningEnvironment, 0, 3), (LightningEnvironment, 1, 0), (TorchElasticEnvironment, 1, 3)],
)
def test_a_process_that_lightning_started_leaves_the_status_to_the_first(
    begun: Callable[[], TrainingCLI],
    monkeypatch: pytest.MonkeyPatch,
    environment: type[ClusterEnvironment],
    rank: int,
    status: int,
) -> None:
    cli = begun()
    cli.trainer._accelerator_connector.cluster_environment = environment()
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    cli._stop_early("stopped")
    assert cli.exit_status == status


def test_one_rank_writes_the_weights(begun: Callable[[], TrainingCLI], monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[object] = []
    monkeypatch.setattr("ds_lightning.training_cli.save_hf", lambda *arguments, **settings: written.append(arguments))
    cli = begun()
    cli.model = cli.datamodule = Mock()
    for is_first, times in ((False, 0), (True, 1)):
        monkeypatch.setattr(Trainer, "is_global_zero", is_first)
        cli._export(Path("weights"))
        assert len(written) == times
