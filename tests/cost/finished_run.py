"""Folders of finished runs, written by hand; seconds are booked by the real ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ds_lightning.cost import Ledger, find_price

CONFIGS = Path(__file__).parents[2] / "configs"
TOKENS = 122_880


def write_run(folder: Path, *, tokens: int = TOKENS, heldout: int = 30_000, content: Any = None) -> Path:
    """Write config, data manifest and report of a run; without a config, of tiny.yaml."""
    if content is None:
        content = yaml.safe_load((CONFIGS / "pretrain/tiny.yaml").read_text())
        content["model"]["init_args"]["config"] = yaml.safe_load((CONFIGS / "model/tiny.yaml").read_text())
    content["data"]["init_args"]["folder"] = str(folder / "data")
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "manifest.json").write_text(json.dumps({"splits": {"val": {"tokens": heldout}}}))
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    (folder / "report.json").write_text(json.dumps({"stages": [{"tokens": tokens}]}))
    return folder


def book(folder: Path, seconds: dict[str, float]) -> None:
    """Let the real ledger book a run on a clock that a test moves."""
    now = 10**12
    ledger = Ledger.open(
        folder / "ledger.jsonl", find_price("cpu"), num_devices=1, clock=lambda: now, started_ns=now, background=False
    )
    for phase, time in seconds.items():
        ledger.enter(phase)
        now += round(time * 1e9)
    ledger.close()


def write_recorded_pretraining(folder: Path) -> dict[str, Any]:
    """Write the run of docs/results/pretrain.json, with the seconds of its phases; return its figures."""
    record: dict[str, Any] = json.loads((CONFIGS.parent / "docs/results/pretrain.json").read_text())["stage"]
    content = yaml.safe_load((CONFIGS / "pretrain/quickstart.yaml").read_text())
    content["model"]["init_args"]["config"] = yaml.safe_load((CONFIGS / "model/quickstart.yaml").read_text())
    content["trainer"]["precision"] = "bf16-mixed"
    write_run(folder, tokens=record["tokens"], heldout=206_714, content=content)
    book(folder, {phase: row["seconds"] for phase, row in record["phases"].items()})
    return record
