"""Oracle: what a shell sees of the real process: its exit status and its two streams."""

from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from ds_lightning import cli, training_cli
from ds_lightning.user_errors import RunFailedError
from tests.cli.command_line import CommandLine
from tests.e2e.command import start


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["frobnicate"], 2, "no command 'frobnicate', expected one of fit, validate, test, predict, "),
        (["fit", "--config", "none.yaml"], 2, "none.yaml: No such file or directory"),
        (["ledger", "none"], 2, "none has no ledger.jsonl, expected the folder of a run"),
        (
            ["data", "prepare", "--sources", "[none]", "--folder", "x"],
            2,
            "the source none does not exist, expected a fi",
        ),
    ],
)
def test_a_mistake_is_one_line_on_stderr(arguments: list[str], status: int, line: str, tmp_path: Path) -> None:
    process = start(tmp_path, *arguments)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (status, "")
    assert err.startswith(f"ds-lightning: {line}")
    assert err.count("\n") == 1


def test_a_bug_keeps_its_traceback(command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(argv: list[str]) -> int:
        return int("seven")

    monkeypatch.setattr(cli, "_ledger", lambda argv: compile(" ".join(argv), "library", "eval"))
    with pytest.raises(SyntaxError):
        command("ledger", "no", "Python")
    monkeypatch.setattr(cli, "_ledger", broken)
    with pytest.raises(ValueError, match="invalid literal for int"):
        command("ledger", "run")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 1, "interrupted"),
        (MemoryError(), 1, "out of memory"),
        (MemoryError("CUDA out of memory"), 1, "CUDA out of memory"),
        (RunFailedError("step 5: the loss is nan"), 1, "step 5: the loss is nan"),
        (PermissionError(13, "Permission denied", "x"), 2, "x: Permission denied"),
        (OSError(28, "No space left on device", "a", None, "b"), 1, "b: No space left on device"),
        (OSError("no number\nand two lines"), 1, "no number and two lines"),
    ],
)
def test_what_the_system_says_is_one_line(
    error: BaseException, status: int, line: str, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_ledger", fail)
    said = command("ledger", "run")
    assert (said.status, said.err) == (status, [f"ds-lightning: {line}"])


def test_a_gpu_that_is_full_is_one_line(command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: list[str]) -> int:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(cli, "_generate", fail)
    said = command("generate")
    assert (said.status, said.err) == (1, ["ds-lightning: no room; fewer or shorter texts at a time need less"])


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (MisconfigurationException("one\nand two"), 2, "one and two"),
        (
            torch.OutOfMemoryError("no room"),
            1,
            "no room; a smaller micro-batch (a larger trainer.accumulate_grad_batches) needs l",
        ),
    ],
)
def test_what_lightning_and_torch_say_is_one_line(
    error: Exception, status: int, line: str, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(argv: list[str], default_out: str) -> None:
        raise error

    monkeypatch.setattr(training_cli, "TrainingCLI", fail)
    said = command("fit", "--config", "run.yaml")
    assert said.status == status
    assert len(said.err) == 1
    assert said.err[0].startswith(f"ds-lightning: {line}")
