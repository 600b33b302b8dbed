"""Oracles: DeepSeek-V3's published bill, NVIDIA's published speed, arithmetic by hand, constructors' own defaults."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds_lightning.cost import plan
from ds_lightning.cost.efficiency import choose_efficiency, read_efficiencies
from ds_lightning.cost.prices import find_price, known_hardware
from ds_lightning.cost.roofline import muon_flops
from ds_lightning.cost.run_config import DEFAULTS, read_run
from tests.cost.shapes import SMALL

CONFIGS = Path(__file__).parents[2] / "configs"
V3, SMALL_RUN = CONFIGS / "pretrain/v3.yaml", CONFIGS / "pretrain/small.yaml"
TINY, GPU = CONFIGS / "pretrain/tiny.yaml", CONFIGS / "trainer/gpu1.yaml"


def test_deepseek_v3_costs_what_its_report_says() -> None:
    report = plan(V3, device="h800", num_devices=2048, usd_per_device_hour=2)
    assert report["device_hours"] == pytest.approx(2_664_000, rel=0.001)
    assert report["usd"] == pytest.approx(5_328_000, rel=0.001)
    assert report["parameters"] == 671_026_419_200
    assert report["active_parameters"] == 37_552_297_472
    assert report["flops_per_token"] == 260_641_652_736
    assert report["tokens"] == 14_800_000_000_000
    assert report["efficiency"]["name"] == "deepseek-v3-h800"
    assert round(report["efficiency"]["value"], 3) == 0.406
    assert report["usd_low"] <= report["usd"] <= report["usd_high"]
    assert "40.6%" in report["assumption"]
    json.dumps(report)


def test_deepseek_v3_on_h100_takes_nvidias_hours() -> None:
    report = plan(V3, device="h100", num_devices=1024)
    assert report["efficiency"]["name"] == "nvidia-v3-h100"
    assert report["device_hours"] == pytest.approx(214_000 * 14.8, rel=0.01)
    assert report["usd"] == pytest.approx(report["device_hours"] * 2.95)
    assert report["usd_low"] == pytest.approx(report["device_hours_low"] * 1.25)  # spot
    assert "spot price of 1.25" in report["assumption"]


def test_deepseek_v3_is_laid_out_as_published_and_said_not_to_run_so() -> None:
    report = plan(V3, device="h800", num_devices=2048)
    layout = {key: report[key] for key in ("zero_stage", "expert_parallel", "pipeline_parallel", "recompute")}
    assert layout == {"zero_stage": 1, "expert_parallel": 64, "pipeline_parallel": 16, "recompute": True}
    assert not report["runs_today"]
    assert "which this package does not run" in report["notes"][0]
    assert report["memory_gb"]["total"] < 80 * 0.92
    assert report["step_bound_seconds"]["bound_by"] == "compute"


def test_a_budget_in_the_config_ends_the_run(tmp_path: Path) -> None:
    overlay = tmp_path / "budget.yaml"
    overlay.write_text("budget: {usd: 1.0}\ncost: {device: h200}")
    report = plan([SMALL_RUN, GPU, overlay], usd_per_device_hour=4)
    assert report["usd"] == pytest.approx(1.0)
    assert report["device_hours"] == pytest.approx(0.25)
    assert report["tokens"] < 3_000_000_000


def test_time_follows_the_efficiency_asked_for() -> None:
    report = plan([SMALL_RUN, GPU], device="h200", efficiency=0.1)
    flops = 3_000_000_000 * report["flops_per_token"]
    assert report["wall_seconds"] == pytest.approx(flops / 98.95e12)
    assert report["usd_high"] == report["usd"]


def test_a_step_is_never_faster_than_its_links() -> None:
    """Weights gathered over 10 Gb/s for every micro-batch: that and not the efficiency is the time of a step."""
    report = plan(
        CONFIGS / "pretrain/v2_lite.yaml", device="rtx4090", num_devices=64, usd_per_device_hour=1, zero_stage=3
    )
    bound = report["step_bound_seconds"]
    assert bound["bound_by"] == "communication"
    assert report["wall_seconds"] == pytest.approx(bound["total"] * 1e12 / (2048 * 4096))
    assert "communication" in report["assumption"]


def test_the_ring_of_gradients_is_that_of_the_zero_paper() -> None:
    """Two bytes-widths of 4 a parameter times 7/8 over 450 GB/s for eight devices of one node."""
    report = plan([SMALL_RUN, CONFIGS / "trainer/ddp8.yaml"], device="h200")
    trained = report["parameters_with_mtp"] - 12 * 32
    assert report["step_bound_seconds"]["data_parallel"] == pytest.approx(trained * 8 * 7 / 8 / 450e9)


def test_muons_products_are_counted_matrix_by_matrix() -> None:
    def one(rows: int, columns: int) -> float:
        few, many = sorted((rows, columns))
        return 5 * (2 * few * few * many + 2 * few**3 + 2 * few * few * many)

    attention = one(48, 128) + one(4 * 32, 48) + one(48, 128) + one(4 * 64, 40) + one(128, 160)
    experts = 8 * (2 * one(96, 128) + one(128, 96)) + 2 * one(96, 128) + one(128, 96)
    dense = 2 * one(320, 128) + one(128, 320)
    assert muon_flops(SMALL) == pytest.approx(4 * attention + dense + 3 * experts + one(128, 256))


def test_the_nearest_model_on_the_device_gives_the_efficiency() -> None:
    def chosen(device: str, active: float) -> str:
        return choose_efficiency(known_hardware(device), int(active))[0].name

    assert chosen("h100", 30e9) == "nvidia-v3-h100"
    assert chosen("h100", 2e9) == "torchtitan-16b-h100"
    assert chosen("h200", 2e9) == "prime-rl-30b-h200"
    assert chosen("h200", 50e9) == "nvidia-v3-h100"  # the one on the device is of a model too small to compare
    assert chosen("h200", 50e6) == "prime-rl-30b-h200"  # none is comparable
    efficiency, on_device = choose_efficiency(known_hardware("a100"), 30_000_000_000)
    assert not on_device
    assert efficiency.low <= efficiency.value <= efficiency.high


def test_published_efficiencies_have_dates_and_are_shares() -> None:
    found = {entry.name: entry.value for entry in read_efficiencies()}
    assert all(0 < value < 1 for value in found.values())
    assert round(found["nvidia-v3-h100"], 3) == 0.342
    assert round(found["torchtitan-16b-h100"], 3) == 0.205
    assert all(entry.date and entry.source for entry in read_efficiencies())


def test_defaults_are_those_of_the_constructors() -> None:
    from ds_lightning import callbacks
    from ds_lightning.data import TokenDataModule
    from ds_lightning.training import PretrainModule

    owners: dict[str, Any] = {
        "model.init_args": PretrainModule,
        "data.init_args": TokenDataModule,
        "cost": callbacks.CostLedger,
        "budget": callbacks.Budget,
        "checkpoints": callbacks.Checkpoints,
    }
    for key, default in DEFAULTS.items():
        section, _, name = key.rpartition(".")
        if section in owners:
            constructors = [base for base in owners[section].__mro__ if "__init__" in vars(base)]
            known = [inspect.signature(base).parameters for base in constructors]
            assert next(found[name].default for found in known if name in found) == default, key


def test_steps_of_a_ramp_are_those_of_the_batch_schedule() -> None:
    """Within a tenth of a percent: the plan lets the batch grow evenly, the schedule in stairs."""
    from ds_lightning.data.sampler import BatchSchedule, StepPlan

    run = read_run(V3)
    schedule = StepPlan(BatchSchedule(15360, 469_000_000_000, 3072, 3072), 4096, run.tokens)
    assert run.steps(run.tokens) == pytest.approx(schedule.num_steps, rel=0.02)
    fine = StepPlan(BatchSchedule(15360, 469_000_000_000, 3072, 64), 4096, run.tokens)
    assert run.steps(run.tokens) == pytest.approx(fine.num_steps, rel=0.001)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "h80"}, r"device is 'h80'; did you mean h800\? expected one of a100, b200, cpu, gb200"),
        ({"device": "quantum"}, r"device is 'quantum', expected one of a100"),
        ({"device": "h100", "num_devices": 0}, "num_devices is 0, expected at least 1"),
        ({"device": "h100", "usd_per_device_hour": -1}, "usd_per_device_hour of h100 is -1, expected a finite number"),
        ({"device": "rtx4090"}, "no on-demand price for device 'rtx4090'"),
        ({"device": "h100", "efficiency": 1.5}, "efficiency is 1.5, expected a share of the peak above 0"),
        ({"device": "h100", "efficiency": "nvidia-v3"}, r"efficiency is 'nvidia-v3'; did you mean nvidia-v3-h100\?"),
        ({"device": "h100", "zero_stage": 4}, "zero_stage is 4, expected 0 to 3"),
        ({"device": "h100", "zero_stage": 0, "offload": True}, "zero_stage is 0 with offload, expected 1 to 3"),
        (
            {"device": "h100", "num_devices": 8, "expert_parallel": 3},
            r"expert_parallel 3 times pipeline_parallel 1 is no",
        ),
        (
            {"device": "h100", "num_devices": 64, "expert_parallel": 64},
            "expert_parallel is 64, expected a divisor of 32",
        ),
        (
            {"device": "h100", "num_devices": 999},
            "batch_size is 64 rows, expected at least one for each of 999 devices",
        ),
        ({}, "names no device: give --device"),
    ],
)
def test_what_cannot_be_planned_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(SMALL_RUN, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "is not YAML"),
        ("3", "holds 3, expected sections"),
        ("data: {init_args: {seq_len: 8, batch_size: 8}}", "has no model.init_args.config, expected a run such as"),
        ("{model: {init_args: {config: {vocab_size: 8}, total_tokens: 9}}}", "has no data.init_args.seq_len"),
    ],
)
def test_a_config_that_is_no_run_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        plan(path, device="h100")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "model.init_args.total_tokens",
            -1,
            "model.init_args.total_tokens is -1, expected a whole number of at least 1",
        ),
        ("data.init_args.batch_size", 2.5, "data.init_args.batch_size is 2.5, expected a whole number"),
        ("budget.usd", -3, "budget.usd is -3, expected more than 0"),
        ("model.init_args.config", 7, "model.init_args.config is 7, expected a file or the fields of a model"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, key: str, value: Any, message: str) -> None:
    content = yaml.safe_load(TINY.read_text())
    content["model"]["init_args"]["config"] = yaml.safe_load((CONFIGS / "model/tiny.yaml").read_text())
    *sections, name = key.split(".")
    at = content
    for section in sections:
        at = at.setdefault(section, {})
    at[name] = value
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        plan(path)


def test_a_price_list_in_another_currency_or_without_a_date_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    entry = "device: h100, usd_per_device_hour: 3, market: on-demand, source: me"
    path.write_text(f"currency: EUR\nprices: [{{{entry}, date: 2026-01-02}}]")
    with pytest.raises(ValueError, match="currency is 'EUR', expected USD: convert the prices"):
        plan(SMALL_RUN, device="h100", prices_file=path)
    path.write_text(f"prices: [{{{entry}}}]")
    with pytest.raises(
        ValueError, match=r"entry 1 of 'prices' has .*; expected device, usd_per_device_hour, market, date"
    ):
        plan(SMALL_RUN, device="h100", prices_file=path)
    path.write_text(f"currency: USD\nprices: [{{{entry}, date: 2026-01-02}}]")
    assert find_price("h100", file=path).usd_per_device_hour == 3


def test_what_does_not_fit_says_what_would() -> None:
    lite = CONFIGS / "pretrain/v2_lite.yaml"
    with pytest.raises(
        ValueError, match=r"does not fit: 1 h100 have 80 GB each.*ZeRO-0 needs .* GB \(weights 2.62"
    ) as one:
        plan(lite, device="h100", num_devices=1)
    assert "8 devices at ZeRO-3 with micro-batches of one row" in str(one.value)


def test_a_remedy_that_is_named_fits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not fit") as refused:
        plan([SMALL_RUN, GPU], device="rtx4090", usd_per_device_hour=1)
    assert "trainer.accumulate_grad_batches 64" in str(refused.value)
    overlay = tmp_path / "remedy.yaml"
    overlay.write_text("trainer: {accumulate_grad_batches: 64}")
    assert plan([SMALL_RUN, GPU, overlay], device="rtx4090", usd_per_device_hour=1)["zero_stage"] == 0


def test_the_lowest_stage_that_fits_is_chosen_and_another_can_be_asked_for() -> None:
    lite = CONFIGS / "pretrain/v2_lite.yaml"
    chosen = plan(lite, device="h200", num_devices=8)["zero_stage"]
    assert chosen > 0
    with pytest.raises(ValueError, match=f"ZeRO-{chosen - 1} needs"):
        plan(lite, device="h200", num_devices=8, zero_stage=chosen - 1)
    assert plan(lite, device="h200", num_devices=8, zero_stage=3)["zero_stage"] == 3
    offloaded = plan(lite, device="h200", num_devices=8, offload=True)
    assert offloaded["memory_gb"]["optimizer"] == 0
    assert offloaded["memory_gb"]["host"] > 0
