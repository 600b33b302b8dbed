"""The real command on a tiny corpus: its processes, and what their run folder says afterwards."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader  # type: ignore[import-untyped]
from tensorboard.util import tensor_util  # type: ignore[import-untyped]

from ds_lightning.training import checkpoint
from tests.e2e.warm import ROOT as ROOT
from tests.e2e.warm import Ranks

NUM_STEPS = 12
ACCUMULATE = 2
VALIDATE_EVERY = 4  # optimizer steps
SAVE_EVERY = 3
MODEL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 128,
}


def config(**overrides: Any) -> dict[str, Any]:
    """Return a run of ``NUM_STEPS`` steps; overrides by dotted key with ``__`` for the dots."""
    values: dict[str, Any] = {
        "model": {
            "class_path": "ds_lightning.training.PretrainModule",
            "init_args": {"config": MODEL, "total_tokens": NUM_STEPS * 8 * 64, "lr": 4e-3},
        },
        "data": {
            "class_path": "ds_lightning.data.TokenDataModule",
            "init_args": {
                "sources": ["corpus"],
                "folder": "prepared",
                "vocab_size": MODEL["vocab_size"],
                "seq_len": 64,
                "batch_size": 8,
                "val_fraction": 0.1,
                "val_batch_size": 4,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "gradient_clip_val": 1.0,
            "accumulate_grad_batches": ACCUMULATE,
            "val_check_interval": VALIDATE_EVERY * ACCUMULATE,
            "log_every_n_steps": 1,
            "callbacks": [{"class_path": "tests.e2e.interruption.Interruption"}],
        },
        "checkpoints": {"every_n_steps": SAVE_EVERY},
        "samples": {"every_n_steps": 5, "prompts": ["river "], "max_new_tokens": 8},
    }
    for key, value in overrides.items():
        *sections, last = key.split("__")
        at = values
        for section in sections:
            at = at.setdefault(section, {})
        at[last] = value
    return values


def write_corpus(folder: Path, documents: int = 40) -> None:
    """Write small documents of a few words in random order."""
    draw = random.Random(0)
    words = ["river", "stone", "cloud", "light", "number", "value", "return", "define", "class", "import", "yield"]
    folder.mkdir()
    for index in range(documents):
        text = " ".join(draw.choice(words) + ("\n" if draw.random() < 0.1 else "") for _ in range(400))
        (folder / f"{index:02}.txt").write_text(text, encoding="ascii")


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start ``ds-lightning`` in a session of its own, as a shell would, with pipes to its output."""
    return subprocess.Popen(
        [sys.executable, "-m", "ds_lightning", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@dataclass
class Attempt:
    """One process that ran to its end."""

    status: int
    seconds: float
    """From before its start until it was gone."""
    alive: float
    """From before its start until it was gone, or until it killed itself: no process can book what comes then."""
    out: str
    err: str

    @property
    def started_from(self) -> int:
        """Step of the checkpoint that it went on from; 0: none."""
        lines = [line for line in self.err.splitlines() if line.startswith("going on from")]
        return int(lines[0].rpartition("step-")[2]) if lines else 0


@dataclass
class Run:
    """A run folder, and the attempts made in it; always by the same command."""

    folder: Path
    settings: dict[str, Any]
    name: str
    warm: bool = False
    """Whether attempts are forks of a process that has imported what they need."""
    attempts: list[Attempt] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Write the config file."""
        (self.folder / f"{self.name}.yaml").write_text(yaml.safe_dump(self.settings), encoding="ascii")

    @property
    def out(self) -> Path:
        return self.folder / self.name

    def command(self) -> list[str]:
        return ["fit", "--config", f"{self.name}.yaml", "--out", self.name]

    def attempt(
        self, interrupt: str | None = None, *, status: int = 0, sleep: float = 0.0, **environment: str
    ) -> "Run":
        """Run the command to its end, and expect the exit status."""
        environment |= {"SLEEP": str(sleep)} | ({"INTERRUPT": interrupt} if interrupt else {})
        killed = self.folder / f"{self.name}.interrupted"
        environment["INTERRUPTED_AT"] = str(killed)
        began = time.monotonic()
        if self.warm:
            ranks = Ranks(self.folder, self.command(), self.settings["trainer"]["devices"], **environment)
            ended, out, err = max(ranks.wait(300), key=abs), ranks.said("out"), ranks.said("err")
            began, seconds = ranks.began, max(ranks.ended) - ranks.began
        else:
            process = start(self.folder, *self.command(), **environment)
            out, err = process.communicate(timeout=300)
            ended, seconds = process.returncode, time.monotonic() - began
        alive = float(killed.read_text()) - began if ended == -signal.SIGKILL else seconds
        self.attempts.append(Attempt(ended, seconds, alive, out, err))
        assert ended == status, f"status {ended}, expected {status}:\n{err[-3000:]}"
        return self

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.out / "checkpoints").iterdir())

    def state(self) -> dict[str, Any]:
        """Return the newest valid checkpoint, without what depends on the clock."""
        newest, skipped = checkpoint.newest_valid(self.out / "checkpoints")
        assert newest is not None
        assert skipped == []
        state: dict[str, Any] = torch.load(newest / checkpoint.STATE)
        state["random"] = torch.load(newest / checkpoint.rank_file(0))
        state["callbacks"].pop("CostLedger")
        return state

    def exported(self) -> dict[str, torch.Tensor]:
        return load_file(self.out / "weights" / "model.safetensors")

    def logged(self) -> dict[str, dict[int, float]]:
        """Return the scalars of all attempts by tag and step, the last value of a step; not those of the clock."""
        points: dict[str, dict[int, float]] = {}
        for file in sorted((self.out / "tensorboard").glob("events.out.tfevents.*")):
            for tag, step, value in _scalars(file):
                if not tag.startswith(("cost/", "speed/")):
                    points.setdefault(tag, {})[step] = value
        return points

    def ledger(self) -> dict[str, Any]:
        """Return what ``ds-lightning ledger --json`` prints."""
        process = start(self.folder, "ledger", self.name, "--json")
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        report: dict[str, Any] = json.loads(out)
        return report


def _scalars(file: Path) -> Iterator[tuple[str, int, float]]:
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "scalars":
                yield value.tag, event.step, float(tensor_util.make_ndarray(value.tensor))
