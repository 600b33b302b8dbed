"""Oracles: a run folder whose ledger and report are written by hand, and the bill that they add up to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds_lightning.cost import calibration_from_run, plan
from ds_lightning.cost.calibration import Calibration, num_checkpoints, validation_tokens, write_calibration
from ds_lightning.cost.run_config import read_run
from tests.cost.finished_run import CONFIGS, TOKENS, book, write_recorded_pretraining, write_run

SECONDS = {"startup": 8.0, "data": 1.0, "train": 40.0, "validate": 5.0, "checkpoint": 0.5, "export": 0.1, "idle": 0.2}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run of a minute."""
    folder = write_run(tmp_path / "run")
    book(folder, SECONDS)
    return folder


def calibrated(run_dir: Path) -> Path:
    file = run_dir / "cpu.json"
    Calibration(**calibration_from_run(run_dir)).write(file)
    return file


def test_a_plan_by_a_run_is_that_run(run_dir: Path) -> None:
    report = plan(run_dir / "config.yaml", calibration=calibrated(run_dir))
    booked = {phase: row["seconds"] for phase, row in report["phases"].items()}
    assert booked == pytest.approx(SECONDS)
    assert report["tokens"] == TOKENS
    assert report["usd"] == pytest.approx(sum(SECONDS.values()) / 3600 * 0.0496)
    assert report["usd_low"] == pytest.approx(0.9 * report["usd"])
    assert report["efficiency"]["name"] == "calibration"
    assert str(run_dir) in report["assumption"]


def test_twice_the_tokens_take_twice_the_training_and_the_same_start(run_dir: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "longer.yaml"
    overlay.write_text(f"model: {{init_args: {{total_tokens: {2 * TOKENS}}}}}")
    phases = plan([run_dir / "config.yaml", overlay], calibration=calibrated(run_dir))["phases"]
    assert phases["train"]["seconds"] == pytest.approx(80)
    assert phases["data"]["seconds"] == pytest.approx(2)
    assert phases["checkpoint"]["seconds"] == pytest.approx(1)
    assert phases["startup"]["seconds"] == pytest.approx(8)
    assert phases["export"]["seconds"] == pytest.approx(0.1)
    assert 5 < phases["validate"]["seconds"] < 10  # the last one is the same


@pytest.mark.parametrize("limit", ["hours: 0.01", f"usd: {0.01 * 0.0496}"])
def test_a_budget_pays_for_the_whole_run_and_leaves_four_seconds(run_dir: Path, tmp_path: Path, limit: str) -> None:
    overlay = tmp_path / "budget.yaml"
    overlay.write_text(f"budget: {{{limit}}}\nmodel: {{init_args: {{total_tokens: 100000000}}}}")
    report = plan([run_dir / "config.yaml", overlay], calibration=calibrated(run_dir))
    assert report["wall_seconds"] == pytest.approx(36 - 4, abs=0.1)
    assert report["tokens"] < 100_000_000
    assert report["usd_high"] - report["usd_low"] < 0.05 * report["usd"]  # the money is spent, fast or slow


def test_validation_is_counted_batch_by_batch() -> None:
    """tiny.yaml: 8 rows of 128 a batch, 2 before training, all after every 20 steps of 60, and all at the end."""
    run = read_run(CONFIGS / "pretrain/tiny.yaml")
    assert validation_tokens(run, TOKENS, 30_000, 1) == 2 * 1024 + 3 * 30 * 1024 + 30_000
    quick = read_run(CONFIGS / "pretrain/quickstart.yaml")  # 5 batches of 8 x 256 after every 400 steps
    assert validation_tokens(quick, 1000 * 2048, 500_000, 1) == 2 * 2048 + 2 * 5 * 2048 + 500_000
    assert validation_tokens(run, TOKENS, 0, 1) == 0


def test_checkpoints_come_by_steps_or_seconds() -> None:
    assert num_checkpoints(read_run(CONFIGS / "pretrain/tiny.yaml"), 60, 1e9) == 3
    assert num_checkpoints(read_run(CONFIGS / "pretrain/tiny.yaml"), 61, 1e9) == 4
    assert num_checkpoints(read_run(CONFIGS / "pretrain/quickstart.yaml"), 5, 150) == 3


def test_data_that_are_not_prepared_are_taken_to_be_like_the_runs(run_dir: Path) -> None:
    file = calibrated(run_dir)
    shutil.rmtree(run_dir / "data")
    report = plan(run_dir / "config.yaml", calibration=file)
    assert report["phases"]["validate"]["seconds"] == pytest.approx(5)
    assert report["notes"] == ["the data are not prepared: 30,000 held-out tokens, as in the calibrating run"]


def test_muon_costs_its_products(run_dir: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "muon.yaml"
    overlay.write_text("model: {init_args: {optimizer: muon}}")
    report = plan([run_dir / "config.yaml", overlay], calibration=calibrated(run_dir))
    assert report["phases"]["train"]["seconds"] > 42


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 3}, r"no key 'speed' in a calibration; expected device, num_devices"),
        ({"startup_second": 3}, r"no key 'startup_second' in a calibration; did you mean startup_seconds\?"),
        ({"startup_seconds": -1}, "startup_seconds is -1, expected a finite number of at least 0"),
        ({"train_seconds_per_flop": 0}, "expected to be more than 0"),
        ({"device": 4}, "calibration: device is 4, expected text"),
        ({"device": "h100"}, "was measured on 'h100', expected 'cpu'"),
    ],
)
def test_a_calibration_that_is_none_is_refused(run_dir: Path, change: dict[str, Any], message: str) -> None:
    file = calibrated(run_dir)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        plan(run_dir / "config.yaml", calibration=file)


def test_a_file_that_is_no_calibration_is_refused(run_dir: Path) -> None:
    file = run_dir / "cpu.json"
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "holds a JSON list"),
        ('{"device": "cpu"}', "lacks num_devices"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            Calibration.read(file)
    with pytest.raises(ValueError, match=r"efficiency is 0.5 and calibration .*, expected only one of them"):
        plan(run_dir / "config.yaml", calibration=calibrated(run_dir), efficiency=0.5)


def test_only_a_run_that_ended_calibrates(run_dir: Path) -> None:
    (run_dir / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="has no stage with its tokens"):
        calibration_from_run(run_dir)
    (run_dir / "report.json").unlink()
    with pytest.raises(ValueError, match=r"has no report.json, expected a run that came to its end"):
        calibration_from_run(run_dir)
    (run_dir / "ledger.jsonl").unlink()
    with pytest.raises(ValueError, match=r"has no ledger.jsonl"):
        calibration_from_run(run_dir)


def test_a_manifest_without_a_held_out_split_is_refused(run_dir: Path) -> None:
    (run_dir / "data" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="does not count the tokens of a split 'val'"):
        calibration_from_run(run_dir)


def test_a_budget_that_ends_before_the_first_token_is_refused(run_dir: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "budget.yaml"
    overlay.write_text("budget: {hours: 0.0001}")
    with pytest.raises(ValueError, match="budget ends before the first token"):
        plan([run_dir / "config.yaml", overlay], calibration=calibrated(run_dir))


def test_the_recorded_pretraining_is_planned(tmp_path: Path) -> None:
    """docs/results/pretrain.json, which its budget ended: tokens and dollars within a tenth."""
    record = write_recorded_pretraining(tmp_path / "run")
    report = plan(tmp_path / "run" / "config.yaml", calibration=calibrated(tmp_path / "run"))
    assert report["usd"] == pytest.approx(record["usd"], rel=0.1)
    assert report["tokens"] == pytest.approx(record["tokens"], rel=0.1)
    assert report["device_hours"] == pytest.approx(0.13 - 4 / 3600, rel=1e-3)  # the budget but for its margin


def test_a_run_that_recorded_its_peak_memory_plans_that_of_the_next(run_dir: Path, tmp_path: Path) -> None:
    bare = plan(run_dir / "config.yaml")["memory_gb"]
    assert plan(run_dir / "config.yaml", calibration=calibrated(run_dir))["memory_gb"]["base"] == 0.0
    (run_dir / "report.json").write_text(json.dumps({"stages": [{"tokens": TOKENS, "peak_memory_gb": 0.75}]}))
    memory = plan(run_dir / "config.yaml", calibration=calibrated(run_dir))["memory_gb"]
    assert memory["total"] == pytest.approx(0.75)
    assert memory["base"] == pytest.approx(0.75 - bare["total"])
    overlay = tmp_path / "wider.yaml"
    overlay.write_text("data: {init_args: {batch_size: 32}}")
    wider = plan([run_dir / "config.yaml", overlay], calibration=calibrated(run_dir))["memory_gb"]
    assert wider["base"] == pytest.approx(memory["base"])
    assert wider["activations"] > 1.5 * memory["activations"]


def test_a_finished_run_leaves_its_calibration_where_such_a_run_can_be_planned(run_dir: Path) -> None:
    path = write_calibration(run_dir)
    assert path == run_dir / "calibration.json"
    assert Calibration.read(path) == Calibration(**calibration_from_run(run_dir))
    content = yaml.safe_load((run_dir / "config.yaml").read_text())
    del content["data"]["init_args"]["seq_len"]  # as of rollouts
    (run_dir / "config.yaml").write_text(yaml.safe_dump(content))
    assert write_calibration(run_dir) is None
