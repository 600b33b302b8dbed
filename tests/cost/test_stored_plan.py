"""Oracle: the planner itself, asked by hand for the same run."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds_lightning.cost import plan
from ds_lightning.cost.calibration import write_calibration
from ds_lightning.cost.stored_plan import read_plan, store_plan
from tests.cost.finished_run import book, write_run

SECONDS = {"startup": 8.0, "data": 1.0, "train": 40.0, "validate": 5.0, "checkpoint": 0.5, "export": 0.1, "idle": 0.2}


def config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    return content


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The folder of tiny.yaml."""
    folder = write_run(tmp_path / "run")
    book(folder, SECONDS)
    return folder


def test_a_run_stores_the_plan_that_the_planner_makes_of_it(run_dir: Path) -> None:
    stored = store_plan(run_dir, config(run_dir), num_devices=1)
    assert read_plan(run_dir) == stored
    assert stored["plan"] == json.loads(json.dumps(plan(run_dir / "config.yaml")))
    assert stored["calibration"] is None
    assert sorted(path.name for path in run_dir.glob("plan*")) == ["plan.json"]


def test_with_a_calibration_every_phase_is_planned(run_dir: Path) -> None:
    file = write_calibration(run_dir)
    stored = store_plan(run_dir, config(run_dir), num_devices=1, calibration=str(file))
    assert {phase: row["seconds"] for phase, row in stored["plan"]["phases"].items()} == pytest.approx(SECONDS)


def test_a_later_attempt_keeps_the_plan_and_a_longer_run_has_another(run_dir: Path) -> None:
    store_plan(run_dir, config(run_dir), num_devices=1)
    first = (run_dir / "plan.json").read_text().replace('"date": "', '"date": "before ')
    (run_dir / "plan.json").write_text(first)
    assert store_plan(run_dir, config(run_dir), num_devices=1)["date"].startswith("before")
    longer = config(run_dir)
    longer["model"]["init_args"]["total_tokens"] *= 2
    stored = store_plan(run_dir, longer, num_devices=1)
    assert stored["plan"]["tokens"] == 2 * 122_880
    assert not stored["date"].startswith("before")


def test_a_run_that_cannot_be_planned_says_why_and_runs(run_dir: Path) -> None:
    rollouts = config(run_dir)
    del rollouts["data"]["init_args"]["seq_len"], rollouts["model"]["init_args"]["total_tokens"]
    stored = store_plan(run_dir, rollouts, num_devices=1, calibration="of all stages of a recipe.json")
    assert stored["plan"] is None
    assert stored["reason"] == (
        "the config has no model.init_args.total_tokens and no data.init_args.seq_len: "
        "only pretraining on a number of tokens is planned"
    )
    (run_dir / "plan.json").unlink()
    mine = config(run_dir) | {"cost": {"device": "mine", "usd_per_device_hour": 1.0}}
    assert "mine" in store_plan(run_dir, mine, num_devices=1)["reason"]


def test_a_calibration_that_cannot_serve_is_refused(run_dir: Path) -> None:
    (run_dir / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"other.json holds a JSON list, expected the keys"):
        store_plan(run_dir, config(run_dir), num_devices=1, calibration=str(run_dir / "other.json"))
    assert read_plan(run_dir) is None


def test_a_damaged_plan_is_refused(run_dir: Path) -> None:
    (run_dir / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan.json is no stored plan .*: delete it, the next run writes it anew"):
        store_plan(run_dir, config(run_dir), num_devices=1)
