"""The smallest recipe with the real command, killed at random moments. The oracle: the recipe left alone."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.command import ROOT, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

RECIPE = str(ROOT / "configs" / "recipes" / "tiny.yaml")
STAGES = ["base", "zero", "cold_start", "rl_1", "sft", "rl_2"]
KILLS = 10


def recipe(folder: Path, name: str, kill_after: float | None = None) -> tuple[int, str]:
    """Run the recipe to its end, or kill it and every process that it started."""
    process = start(folder, "recipe", RECIPE, "--out", name, "--json")
    if kill_after is not None:
        time.sleep(kill_after)
        family = [process.pid, *children(process.pid)]
        for pid in family:
            os.kill(pid, signal.SIGKILL)
    out, err = process.communicate(timeout=1800)
    assert kill_after is not None or process.returncode == 0, err[-3000:]
    return process.returncode, out


def children(pid: int) -> list[int]:
    """Return the processes that a process started, from Linux's own list."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def weights(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(folder / stage / "weights" / "model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], float]:
    """The recipe left alone: its folder, its report, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("alone")
    began = time.monotonic()
    _, out = recipe(folder, "run")
    return folder / "run", json.loads(out), time.monotonic() - began


def test_six_stages_and_a_bill(alone: tuple[Path, dict[str, Any], float]) -> None:
    folder, report, seconds = alone
    rows = report["stages"]
    assert [row["name"] for row in rows] == STAGES
    for row in rows:
        assert {"pass_at_1", "pass_at_1_greedy", "completion_length"} <= row.keys(), row["name"]
    ledger = report["ledger"]
    assert ledger["usd"] == pytest.approx(sum(row["usd"] for row in rows) + ledger["between"]["usd"])
    assert ledger["wall_seconds"] == pytest.approx(seconds, rel=0.01, abs=0.5)
    assert all(row["sampled"]["kept"] > 0 for row in rows if row["name"] in ("cold_start", "sft"))
    before, after = ({path: path.stat().st_mtime for path in folder.glob("*/report.json")} for _ in range(2))
    recipe(folder.parent, "run")
    assert before == after == {path: path.stat().st_mtime for path in folder.glob("*/report.json")}


def test_a_recipe_that_was_killed_ends_with_the_same_weights(
    alone: tuple[Path, dict[str, Any], float], tmp_path: Path
) -> None:
    folder, _, seconds = alone
    draw = random.Random(time.time_ns())
    moments = [draw.uniform(1.0, seconds / 4) for _ in range(KILLS)]
    print(f"killed after {moments}")
    for moment in moments:
        recipe(tmp_path, "run", kill_after=moment)
    _, out = recipe(tmp_path, "run")
    assert json.loads(out)["ledger"]["chain"] == "ok"
    for stage in STAGES:
        expected = weights(folder, stage)
        found = weights(tmp_path / "run", stage)
        assert all(torch.equal(found[name], expected[name]) for name in expected), stage
