"""Oracles: the exact text for a clock of our own, and what a fit writes to a stream that is or is not a terminal."""

import io
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from rich.progress import Progress
from torch import Tensor, nn

from ds_lightning.callbacks.progress_bar import ProgressBar, status_text


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


class Tokens(LightningModule):
    """Stands in for the pretraining module: 1000 tokens a step."""

    def __init__(self, fail_at: int = -1, error: type[BaseException] = KeyboardInterrupt) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)
        self.tokens_seen = 0
        self.total_tokens = 5000
        self.fail_at = fail_at
        self.error = error

    @property
    def progress(self) -> float:
        return self.tokens_seen / self.total_tokens

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == self.fail_at:
            raise self.error
        self.tokens_seen = 1000 * (batch_idx + 1)
        self.log("train/loss", torch.tensor(2.5))
        self.log("cost/usd", torch.tensor(0.25))
        loss: Tensor = self.line(batch).square().mean()
        return loss

    def validation_step(self, batch: Tensor) -> None:
        self.log("val/bits_per_byte", torch.tensor(1.75))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(bar: ProgressBar, module: Tokens, folder: Path) -> None:
    trainer = Trainer(
        max_steps=5,
        val_check_interval=2,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        callbacks=[bar],
        default_root_dir=folder,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    assert trainer.progress_bar_callback is bar
    trainer.fit(module, torch.ones(5, 1, 1), torch.ones(1, 1, 1))


def stderr(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> Stream:
    """Put a stream in the place of stderr; called in a test's body, since a fixture's would be captured away."""
    stream = Stream(terminal)
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    return stream


def test_status_has_tokens_speed_dollars_and_time_left() -> None:
    now = 100.0
    progress = Progress(get_time=lambda: now, speed_estimate_period=600)
    task_id = progress.add_task("Training", total=20_000_000, completed=4_000_000)
    progress.advance(task_id, 0)
    task = progress.tasks[task_id]
    assert status_text(task, {}) == "20%  4.00M/20.00M tokens"
    now = 200.0
    progress.update(task_id, completed=5_000_000)
    metrics = {
        "train/loss": torch.tensor(3.14159),
        "val/bits_per_byte": torch.tensor(1.7),
        "cost/usd": torch.tensor(0.01234),
        "train/lr": torch.tensor(1.0),
    }
    assert status_text(task, metrics) == (
        "25%  5.00M/20.00M tokens  loss 3.142  val 1.700 bits/byte  10.0k tokens/s  $0.0123  0:25:00 left"
    )
    now = 300.0
    progress.update(task_id, completed=20_000_000)
    assert status_text(task, {"cost/usd": torch.tensor(1234.5)}) == (
        "100%  20.00M/20.00M tokens  80.0k tokens/s  $1,234.50  in 0:03:20"
    )


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(950, "950"), (12_300, "12.3k"), (4_000_000, "4.00M"), (2_500_000_000, "2.50B"), (14_800_000_000_000, "14.80T")],
)
def test_counts_are_written_short(tokens: int, text: str) -> None:
    progress = Progress()
    task_id = progress.add_task("Training", total=tokens)
    assert f"0/{text} tokens" in status_text(progress.tasks[task_id], {})


def test_plain_lines_have_no_control_codes_and_end_with_the_final_state(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipe = stderr(monkeypatch, terminal=False)
    fit(ProgressBar(line_seconds=0.0), Tokens(), tmp_path)
    lines = [line for line in pipe.getvalue().splitlines() if line.startswith("Training")]
    assert len(lines) == 6
    assert lines[0].startswith("Training  20%  1.0k/5.0k tokens  loss 2.500")
    assert "tokens/s" in lines[0]
    assert "bits/byte" not in lines[0]
    state, speed, ending = re.split(r"  (\S+) tokens/s  ", lines[-1])
    assert state == "Training  100%  5.0k/5.0k tokens  loss 2.500  val 1.750 bits/byte"
    assert re.fullmatch(r"[\d.]+[kMBT]?", speed)
    assert re.fullmatch(r"\$0\.2500  in \d:\d\d:\d\d", ending)
    assert "\x1b" not in pipe.getvalue()
    assert "\r" not in pipe.getvalue()


def test_a_pipe_gets_few_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pipe = stderr(monkeypatch, terminal=False)
    fit(ProgressBar(), Tokens(), tmp_path)
    assert sum(line.startswith("Training") for line in pipe.getvalue().splitlines()) == 1


def test_a_terminal_gets_one_live_line_that_ends_complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = stderr(monkeypatch, terminal=True)
    fit(ProgressBar(refresh_seconds=0.0), Tokens(), tmp_path)
    text = terminal.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is hidden and shown again
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).rstrip().splitlines()[-1]
    assert "Training" in last
    assert "100%  5.0k/5.0k tokens  loss 2.500  val 1.750 bits/byte" in last


@pytest.mark.parametrize(("error", "raised"), [(KeyboardInterrupt, SystemExit), (RuntimeError, RuntimeError)])
def test_the_terminal_is_given_back_when_a_fit_breaks_off(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], raised: type[BaseException], tmp_path: Path
) -> None:
    terminal = stderr(monkeypatch, terminal=True)
    with pytest.raises(raised):
        fit(ProgressBar(refresh_seconds=0.0), Tokens(fail_at=2, error=error), tmp_path)
    text = terminal.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1


def test_a_resumed_run_starts_at_its_tokens_and_does_not_count_them_as_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = stderr(monkeypatch, terminal=False)
    bar = ProgressBar(line_seconds=0.0)
    module = Tokens()
    module.tokens_seen = 4000
    trainer = Mock(spec=Trainer, callback_metrics={})
    bar.on_train_start(trainer, module)
    bar.on_train_batch_end(trainer, module, None, None, 0)
    assert pipe.getvalue() == "Training  80%  4.0k/5.0k tokens\n"


def test_only_the_first_rank_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = stderr(monkeypatch, terminal=False)
    bar = ProgressBar(line_seconds=0.0)
    trainer = Mock(spec=Trainer, is_global_zero=False, callback_metrics={})
    bar.setup(trainer, Tokens(), "fit")
    bar.on_train_start(trainer, Tokens())
    bar.on_train_batch_end(trainer, Tokens(), None, None, 0)
    bar.on_train_end(trainer, Tokens())
    assert pipe.getvalue() == ""


def test_a_bar_can_be_switched_off_and_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = stderr(monkeypatch, terminal=False)
    bar, trainer = ProgressBar(), Mock(spec=Trainer, callback_metrics={})
    for switch, lines in ((bar.disable, 0), (bar.enable, 1)):
        switch()
        bar.on_train_start(trainer, Tokens())
        bar.on_train_end(trainer, Tokens())
        assert pipe.getvalue().count("\n") == lines
