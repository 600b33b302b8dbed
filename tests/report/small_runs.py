"""Folders of a run and of a recipe as small as can be, written by hand; seconds are booked by the real ledger."""

import json
from pathlib import Path
from typing import Any

import yaml

from ds_lightning.cost import Ledger, find_price

USD_PER_SECOND = 0.01
"""36 dollars an hour."""

HOSTILE = "</pre><script>document.title = 'owned'</script><img src=x onerror=alert(1)>\u202egnp.\x00 & so on"
"""What a model may write."""


def book(folder: Path, seconds: dict[str, float]) -> None:
    """Let the ledger book seconds by phase."""
    now = 10**12
    price = find_price("mine", usd_per_device_hour=3600 * USD_PER_SECOND)
    ledger = Ledger.open(folder / "ledger.jsonl", price, clock=lambda: now, started_ns=now, background=False)
    for phase, time in seconds.items():
        ledger.enter(phase)
        now += round(time * 1e9)
    ledger.close()


def write_figures(folder: Path, **figures: Any) -> None:
    """Write the report of a stage."""
    stage = {"name": "pretrain", "tokens": 1000, "bits_per_byte": {}, "samples": [], **figures}
    (folder / "report.json").write_text(json.dumps({"stages": [stage]}))


def write_run(folder: Path, **figures: Any) -> Path:
    """Write a run of 100 seconds, which is a dollar, of which 60 trained."""
    folder.mkdir(parents=True)
    book(folder, {"startup": 20, "data": 10, "train": 50, "validate": 15, "idle": 5})
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 7, "data": {"note": HOSTILE}}))
    curves = {
        "train/loss": [[0.3 + 0.01 * step, 6 - 0.1 * step] for step in range(30)],
        "val/loss": [[0.4, 5.0], [0.6, 4.0], [1.0, 3.0]],
        "val/bits_per_byte": [[0.4, 2.5], [0.6, 2.0], [1.0, 1.5]],
        "moe/max_violation": [[0.3, 3.0], [0.6, 1.0], [1.0, 0.5]],
    }
    values = {
        "bits_per_byte": {"gzip_9": 1.8, "xz_9e": 1.4, "model": 1.5},
        "curves": curves,
        "samples": [HOSTILE, "second"],
        "first_samples": ["early", "second, early"],
        "expert_load": [[0.0, 1.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]],
        "peak_memory_gb": 1.1,
    }
    write_figures(folder, **{**values, **figures})
    return folder


def write_plan(folder: Path, phases: dict[str, float], **settings: Any) -> None:
    """Write the plan that a run started from, in seconds by phase."""
    plan = {
        "phases": {phase: {"usd": seconds * USD_PER_SECOND} for phase, seconds in phases.items()},
        "usd": sum(phases.values()) * USD_PER_SECOND,
        "tokens": 1000,
        "memory_gb": {"total": 1.0},
        "assumption": "the device is the same",
    }
    stored = {"date": "2026-11-25", "calibration": None, "settings": {}, "plan": plan, "reason": "", **settings}
    (folder / "plan.json").write_text(json.dumps(stored))


def answers(right: int) -> list[dict[str, Any]]:
    """Return twelve answers of which the first ones are right."""
    return [{"prompt": f"{n} + 1", "answer": HOSTILE, "reward": float(n < right)} for n in range(12)]


def write_recipe(folder: Path) -> Path:
    """Write a recipe of 3 stages of 100 s, to 10%, by GRPO to 30%, by SFT from the first to 10%; 10 s are between."""
    folder.mkdir(parents=True)
    stages: dict[str, Any] = {
        "base": {"what": "pretrain", "from": None},
        "zero": {"what": "GRPO", "from": "base"},
        "sft": {"what": "SFT", "from": "base"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"seed": 3, "stages": stages}, sort_keys=False))
    book(folder, {"startup": 2, "idle": 8})
    for name, solved in (("base", 0.1), ("zero", 0.3), ("sft", 0.1)):
        write_run(folder / name, pass_at_1=solved, first_answers=answers(1), answers=answers(round(10 * solved)))
    (folder / "zero" / "ledger.jsonl").unlink()
    book(folder / "zero", {"startup": 20, "rollout": 30, "reward": 10, "train": 20, "validate": 20})
    write_figures(
        folder / "zero",
        pass_at_1=0.3,
        first_answers=answers(1),
        answers=answers(3),
        curves={
            "val/pass_at_1": [[0.5, 0.2], [1.0, 0.3]],
            "val/pass_at_1_greedy": [[0.5, 0.25], [1.0, 0.35]],
            "completions/mean_length": [[0.3, 10.0], [0.6, 14.0], [0.9, 18.0]],
            "reward": [[0.3, 0.1], [0.6, 0.2], [0.9, 0.4]],
            "frac_reward_zero_std": [[0.3, 0.5], [0.6, 0.25], [0.9, 0.0]],
        },
    )
    return folder
