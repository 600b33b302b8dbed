"""Oracle: a file system that lets no file grow (RLIMIT_FSIZE, /dev/full): one line, status 1, nothing lost."""

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ds_lightning.cost.journal import Journal
from tests.cli.command_line import CommandLine, hashes

FULL = "(File too large|No space left on device)"


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """Let every write of this process beyond so many bytes of a file fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1000, 20_000])
def test_preparing_data_leaves_no_trace(size: int, command: CommandLine, tmp_path: Path) -> None:
    arguments = ("data", "prepare", "--sources", "[corpus]", "--folder", tmp_path / "shards", "--vocab_size", "320")
    with no_file_longer_than(size):
        command.refuses(f"shards: {FULL}", *arguments, status=1)
    assert list(tmp_path.iterdir()) == []
    assert command(*arguments).status == 0


@pytest.mark.parametrize("source", [["export", "run"], ["import", "run/weights"]])
def test_exporting_leaves_the_earlier_export(source: list[str], own: CommandLine) -> None:
    shutil.copytree("run/weights", "earlier")
    with no_file_longer_than(10_000):
        own.refuses(f"earlier: {FULL}", *source, "earlier", "--overwrite", status=1)
    assert own(*source, "earlier", "--overwrite").status == 0


def test_the_config_of_a_run_stays(own: CommandLine) -> None:
    shutil.rmtree("run/checkpoints")
    before = hashes(Path("run"))
    Path("run/config.yaml.tmp").symlink_to("/dev/full")
    said = own("fit", "--config", "run.yaml", "--out", "run")
    assert (said.status, said.err) == (1, ["ds-lightning: run: No space left on device"])
    after = hashes(Path("run"))
    assert {name for name in before if after[name] != before[name]} <= {"ledger.jsonl", "ledger.heartbeat"}


def test_a_checkpoint_that_does_not_fit_ends_the_run_and_the_next_attempt_finishes_it(own: CommandLine) -> None:
    with no_file_longer_than(100_000):
        said = own("fit", "--config", "run.yaml", "--out", "../out")
    assert said.status == 1
    assert said.err[-1:] == ["ds-lightning: ../out: File too large"]
    assert not [line for line in said.err if "Traceback" in line]
    assert list(Path("../out/checkpoints").iterdir()) == []
    assert own("ledger", "../out").status == 0
    assert own("fit", "--config", "run.yaml", "--out", "../out").status == 0
    assert own("ledger", "../out").status == 0


def test_a_ledger_that_cannot_begin_ends_the_run(own: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Journal, "append", full)
    said = own("fit", "--config", "run.yaml", "--out", "../out")
    assert (said.status, said.err) == (1, ["ds-lightning: ../out: No space left on device"])
    assert not Path("../out/config.yaml").exists()
