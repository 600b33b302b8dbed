"""A folder with a corpus, its token shards, a config file and a finished run; made once, copied where need be."""

import logging
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_lightning.callbacks import cost_ledger
from ds_lightning.cli import main
from tests.cli.command_line import CommandLine, write_settings
from tests.e2e.command import write_corpus

_LOGGERS = ("lightning.pytorch", "lightning.fabric")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def _process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a command may do to its process, which ends after it in real life."""
    monkeypatch.setattr(sys, "argv", ["ds-lightning"])
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    yield
    close_ledger()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def close_ledger() -> None:
    """End the ledger that a command left open until its process ends."""
    if cost_ledger._current is not None:
        cost_ledger._current.close()
        cost_ledger._current = None


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace that tests may read and not change."""
    folder = tmp_path_factory.mktemp("workplace")
    write_corpus(folder / "corpus")
    write_settings(folder / "run.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["ds-lightning"])
        assert main(["fit", "--config", "run.yaml", "--out", "run"]) == 0
    close_ledger()
    return folder


@pytest.fixture
def command(finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """The command in the workplace of all tests, which refusals leave as it is."""
    monkeypatch.chdir(finished)
    return CommandLine(finished, capsys)


@pytest.fixture
def own(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CommandLine:
    """The command in a copy of the workplace that the test may change."""
    folder = shutil.copytree(finished, tmp_path / "workplace")
    monkeypatch.chdir(folder)
    return CommandLine(folder, capsys)
