"""Oracles: the exit status and the one line that the command promises, and its JSON against the function's figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ds_lightning.cli import main
from ds_lightning.cost import plan

CONFIGS = Path(__file__).parents[2] / "configs"
V3, SMALL = str(CONFIGS / "pretrain/v3.yaml"), str(CONFIGS / "pretrain/small.yaml")
GPU = str(CONFIGS / "trainer/gpu1.yaml")


def test_json_is_the_plan_in_plain_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "h800", "--num_devices", "2048", "--usd_per_device_hour", "2", "--json"]
    assert main(["plan", "--config", V3, *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == plan([V3], device="h800", num_devices=2048, usd_per_device_hour=2)
    keys = "parameters active_parameters flops_per_token tokens device_hours usd usd_low usd_high zero_stage assumption"
    assert set(keys.split()) <= set(printed)
    assert abs(printed["device_hours"] / 2_664_000 - 1) < 0.01


def test_later_configs_lie_over_earlier_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", SMALL, "--config", GPU, "--device", "h200", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"][-1].startswith("startup")  # a precision was given


def test_the_table_fits_80_columns_and_names_the_assumption(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "--config", V3, "--device", "h800", "--num_devices", "2048"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    words = re.sub(r"\s+", " ", out)
    for expected in ("671,026,419,200", "2,664,034", "5,328,068", "260,641,652,736", "It rests on this", "h800"):
        assert expected in words


def test_a_budget_prints_its_sources_and_a_config_to_copy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "--budget_usd", "300", "--device", "h200"]) == 0
    out = capsys.readouterr().out
    assert "arXiv:2401.02954" in out
    lines = [line.rstrip() for line in out.partition("The config to run:")[2].splitlines()]
    assert "  class_path: ds_lightning.training.PretrainModule" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--config {small}", "names no device: give --device, such as h100"),
        ("--config {small} --device h1000", "device is 'h1000'; did you mean h100?"),
        ("--config {small} --device h100 --num_devices 0", "num_devices is 0, expected at least 1"),
        ("--config {small} --device h100 --usd_per_device_hour=-1", "usd_per_device_hour of h100 is -1.0, expected"),
        (
            "--config {small} --device rtx4090 --usd_per_device_hour 1",
            "what would fit: trainer.accumulate_grad",
        ),
        ("--config nowhere.yaml --device h100", "nowhere.yaml: No such file or directory"),
        ("--config {small} --device h100 --calibration nowhere.json", "nowhere.json: No such file or directory"),
        ("--config {small} --device h100 --zero 1", "zero"),
        ("", "plan: expected either --config or --budget_usd"),
        ("--config {small} --budget_usd 3 --device h100", "plan: expected either --config or --budget_usd"),
        ("--budget_usd 3", "budget_usd without a device, expected --device NAME"),
        ("--budget_usd=-3 --device h100", "budget_usd is -3.0, expected more than 0"),
        ("--budget_usd 0.00001 --device h100", "train nothing, expected enough for 100 steps"),
        (
            "--budget_usd 3 --device h100 --zero_stage 2",
            "zero_stage is 2 with budget_usd, expected it with a config",
        ),
    ],
)
def test_wrong_input_is_one_line_and_status_2(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments.format(small=SMALL).split()]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_calibrating_on_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(tmp_path), str(tmp_path / "cpu.json")]) == 2
    assert "has no ledger.jsonl, expected the folder of a run" in capsys.readouterr().err


def test_a_run_is_calibrated_and_planned_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.cost.finished_run import book, write_run
    from tests.cost.test_calibration import SECONDS

    folder, file = write_run(tmp_path / "run"), tmp_path / "cpu.json"
    book(folder, SECONDS)
    assert main(["calibrate", str(folder), str(file)]) == 0
    assert main(["plan", "--config", str(folder / "config.yaml"), "--calibration", str(file), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert set(printed["phases"]) == set(SECONDS)
