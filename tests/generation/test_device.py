"""A GPU that is asked for and not there. The oracle: the message, by every command that takes a device."""

import pytest
import torch

from ds_lightning.cli import main
from ds_lightning.generation.device import check_device

SAMPLE = (
    "--weights w --folder f --rewards [] --task.class_path ds_lightning.rl.tasks.JsonLinesTask --task.init_args.path p"
)


@pytest.mark.parametrize(
    "command",
    [
        "generate --model m --prompt a --device cuda",
        "generate --model m --chat --prompt a --device cuda",
        f"sample {SAMPLE} --problems 1 --device cuda",
    ],
    ids=["generate", "chat", "sample"],
)
def test_it_is_named_before_anything_is_read(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(command.split()) == 2
    said = "ds-lightning: device is 'cuda', but torch finds no CUDA device here, expected cpu\n"
    assert capsys.readouterr().err == said


def test_a_processor_is_always_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_device("cpu")
