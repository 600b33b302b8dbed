"""Runs of the real command with the trainer of one of the files that ship, on one GPU."""

from pathlib import Path
from typing import Any

import yaml

from tests.e2e.command import ROOT, Run, config

START = "start"
"""Folder of the weights that runs start from."""

ALIKE = {"model__init_args__weights": START, "model__init_args__eps": 1e-3}
"""What lets devices be compared: the same weights, and an AdamW whose step in a gradient next to zero is no toss of a
coin that rounding decides."""


def settings(trainer: str, **overrides: Any) -> dict[str, Any]:
    """Return the small run of the end-to-end tests under ``configs/trainer/<trainer>.yaml``, as ``--config`` merges."""
    values = config(**ALIKE)
    file = ROOT / "configs" / "trainer" / f"{trainer}.yaml"
    values["trainer"] |= yaml.safe_load(file.read_text(encoding="utf-8"))["trainer"]
    for key, value in overrides.items():
        *sections, last = key.split("__")
        at = values
        for section in sections:
            at = at.setdefault(section, {})
        at[last] = value
    return values


def run(folder: Path, name: str, trainer: str, **overrides: Any) -> Run:
    """Return a run that is yet to be made."""
    return Run(folder, settings(trainer, **overrides), name)


def worst(found: dict[int, float], expected: dict[int, float]) -> float:
    """Return the largest relative difference of two curves over the same steps."""
    assert found.keys() == expected.keys()
    return max(abs(found[step] - value) / abs(value) for step, value in expected.items())
