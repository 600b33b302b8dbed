"""The command in this process on a small workplace: what it says, and that a refusal changes no file."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds_lightning.cli import main
from tests.e2e.command import MODEL, config

STEPS = 2
TOKENS = STEPS * 8 * 64
PROGRESS = ("going on from ", "skipped checkpoint ")
"""How lines begin that say what the command does, and not what is wrong."""


@dataclass
class Said:
    """What one command returned and printed."""

    status: int
    out: str
    err: list[str]


def settings(**overrides: Any) -> dict[str, Any]:
    """Return a run of ``STEPS`` steps; overrides by dotted key with ``__`` for the dots."""
    short: dict[str, Any] = {
        "model__init_args": {"config": dict(MODEL), "total_tokens": TOKENS, "lr": 4e-3},
        "trainer": {"accelerator": "cpu", "devices": 1, "val_check_interval": STEPS, "log_every_n_steps": 1},
        "samples__every_n_steps": 100,
    }
    return config(**short | overrides)


def write_settings(path: Path, **overrides: Any) -> Path:
    """Write a config file, see :func:`settings`."""
    path.write_text(yaml.safe_dump(settings(**overrides)), encoding="ascii")
    return path


def hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file under a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class CommandLine:
    """``ds-lightning`` called in a folder that no refusal may change."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capsys = capsys

    def __call__(self, *arguments: object) -> Said:
        """Run one command."""
        self.capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        printed = self.capsys.readouterr()
        return Said(status, printed.out, printed.err.splitlines())

    def refuses(self, message: str, *arguments: object, status: int = 2) -> None:
        """Expect one line on stderr that matches, the exit status, and every file as it was."""
        before = hashes(self.folder)
        said = self(*arguments)
        lines = [line for line in said.err if not line.startswith(PROGRESS)]
        assert len(lines) == 1, said
        assert re.search(message, lines[0]), lines[0]
        assert lines[0].startswith("ds-lightning: ")
        assert (said.status, said.out) == (status, "")
        logs = "/tensorboard/events."  # a logger may have begun a file of its own
        after = {name: value for name, value in hashes(self.folder).items() if name in before or logs not in name}
        assert after == before, sorted(after.items() ^ before.items())
