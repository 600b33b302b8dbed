"""What a run will need and cost, from the YAML that trains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_lightning.cost.budget import MARGIN, MARGIN_SECONDS
from ds_lightning.cost.calibration import (
    Calibration,
    heldout_tokens,
    num_checkpoints,
    training_flops,
    validation_tokens,
)
from ds_lightning.cost.efficiency import Efficiency, choose_efficiency
from ds_lightning.cost.fitting import UNDIVIDED, Division, Fit, fit_layout
from ds_lightning.cost.memory import USABLE, trained_params
from ds_lightning.cost.prices import Hardware, Market, Price, find_price, known_hardware
from ds_lightning.cost.roofline import StepBound, step_bound
from ds_lightning.cost.run_config import RunConfig, read_run
from ds_lightning.flops import active_param_count, forward_flops_per_token, param_count, train_flops_per_token

CALIBRATED_SPREAD = 0.1
"""Part by which a run may differ from the one that calibrated it."""

Phases = dict[str, float]
"""Wall-clock seconds by phase of the ledger."""


def plan(
    config: str | Path | Sequence[str | Path],
    *,
    device: str | None = None,
    num_devices: int | None = None,
    usd_per_device_hour: float | None = None,
    market: Market | None = None,
    prices_file: str | Path | None = None,
    efficiency: str | float | None = None,
    calibration: str | Path | None = None,
    zero_stage: int | None = None,
    offload: bool = False,
    expert_parallel: int | None = None,
    pipeline_parallel: int | None = None,
) -> dict[str, Any]:
    """Return what a run needs and costs, as plain numbers.

    Args:
        config: Config file or files of the run, later ones over earlier ones.
        device: Device in the price list, such as ``h800``; none: that of the config.
        num_devices: Devices; none: those of the config, else 1.
        usd_per_device_hour: Your own price in US dollars; none: that of the config or the price list's.
        market: ``on-demand`` or ``spot``; none: that of the config.
        prices_file: Price list to read instead of the newest one that ships with the package.
        efficiency: Name of a published speed, or your own share of the dense bfloat16 peak; none: the nearest.
        calibration: File written by ``ds-lightning calibrate``; its speeds take the place of published ones.
        zero_stage: The only ZeRO stage to consider; none: the lowest that fits.
        offload: Keep the optimizer's states in the host's memory.
        expert_parallel: Devices that share a layer's experts.
        pipeline_parallel: Devices that share the layers.

    Raises:
        ValueError: If the config is no run, a device, price or efficiency is unknown, or nothing fits.
        OSError: If a file cannot be read.
    """
    return plan_run(
        read_run(config),
        Terms(device, num_devices, usd_per_device_hour, market, prices_file),
        efficiency=efficiency,
        calibration=calibration,
        division=Division(zero_stage, offload, expert_parallel, pipeline_parallel),
    )


@dataclass(frozen=True)
class Terms:
    """Devices and their price, as far as a config does not give them; see :func:`plan`."""

    device: str | None = None
    num_devices: int | None = None
    usd_per_device_hour: float | None = None
    market: Market | None = None
    prices_file: str | Path | None = None


def plan_run(
    run: RunConfig,
    terms: Terms,
    *,
    efficiency: str | float | None = None,
    calibration: str | Path | None = None,
    division: Division = UNDIVIDED,
) -> dict[str, Any]:
    """Return what :func:`plan` does, of a config that is read already.

    Raises:
        ValueError: As :func:`plan`.
    """
    hardware = known_hardware(_device(run, terms.device))
    count = terms.num_devices if terms.num_devices is not None else run.devices or 1
    if count < 1:
        raise ValueError(f"num_devices is {count}, expected at least 1")
    price = _price(run, hardware.device, terms)
    fit = fit_layout(run, hardware, count, division)
    bound = step_bound(
        run.model,
        fit.layout,
        hardware,
        tokens_per_step=run.batch_size * run.seq_len,
        seq_len=run.seq_len,
        micro_batches=fit.micro_batches,
        mixed=run.mixed(hardware.device),
        optimizer=run["model.init_args.optimizer"],
    )
    if calibration is None:
        outcome = _published(run, hardware, bound, count, price, efficiency)
    else:
        if efficiency is not None:
            raise ValueError(f"efficiency is {efficiency!r} and calibration {calibration}, expected only one of them")
        measured = Calibration.read(calibration)
        if measured.device != hardware.device:
            raise ValueError(f"{calibration} was measured on {measured.device!r}, expected {hardware.device!r}")
        outcome = _calibrated(run, measured, bound, count, price)
    return _report(run, hardware, fit, bound, price, outcome)


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """Time of a run, and what it rests on."""

    tokens: float
    phases: Phases
    low: float
    """Factor on the time in the best case."""
    high: float
    """Factor in the worst."""
    efficiency: Efficiency
    assumption: str
    base_memory_gb: float = 0.0
    """Memory of a device beside what the closed form counts."""
    notes: tuple[str, ...] = ()


def _device(run: RunConfig, device: str | None) -> str:
    if device is not None:
        return device
    accelerator = run["trainer.accelerator"]
    if run["cost.device"] == "cpu" and accelerator != "cpu":
        raise ValueError(
            f"{', '.join(run.files)} trains on accelerator {accelerator!r} and names no device: give --device, such as "
            "h100"
        )
    return str(run["cost.device"])


def _price(run: RunConfig, device: str, terms: Terms) -> Price:
    usd = terms.usd_per_device_hour
    if usd is None and device == run["cost.device"]:
        usd = run["cost.usd_per_device_hour"]
    market = terms.market or run["cost.market"]
    return find_price(device, market=market, usd_per_device_hour=usd, file=terms.prices_file)


def _published(
    run: RunConfig,
    hardware: Hardware,
    bound: StepBound,
    devices: int,
    price: Price,
    asked: str | float | None,
) -> _Outcome:
    """Time by a published efficiency, but never less than the devices' memory and links allow."""
    active = active_param_count(run.model, include_embedding=False)
    efficiency, on_device = choose_efficiency(hardware, active, asked)
    peak = hardware.bf16_tflops * 1e12 * devices
    flops_per_token = train_flops_per_token(run.model, run.seq_len)
    least = bound.total * run.steps(1e15) / 1e15  # a token, with the batch of the run's end

    def seconds_per_token(value: float) -> float:
        return max(flops_per_token / (peak * value), least)

    each = seconds_per_token(efficiency.value)
    tokens = float(run.tokens)
    if (hours := _budget_hours(run, price)) is not None:
        tokens = min(tokens, hours * 3600 / devices / each)
    where = "" if on_device else f", measured on another device than {hardware.device}"
    name = efficiency.source if efficiency.source != "user" else "your own figure"
    assumption = f"the devices reach {efficiency.value:.1%} of their dense bfloat16 peak: {name}{where}"
    notes = ["startup, validation, checkpoints and export are not in it: calibrate on a run to plan them"]
    if each > flops_per_token / (peak * efficiency.value):
        assumption = (
            f"a step takes as long as its {bound.bound_by} at peak rates, more than by the efficiency {efficiency.name}"
        )
    return _Outcome(
        tokens=tokens,
        phases={"train": tokens * each},
        low=seconds_per_token(efficiency.high) / each,
        high=seconds_per_token(efficiency.low) / each,
        efficiency=efficiency,
        assumption=assumption,
        notes=tuple(notes),
    )


def _budget_hours(run: RunConfig, price: Price) -> float | None:
    """Return the device-hours that the budget pays for; none: there is no budget."""
    limits = [run["budget.hours"]] if run["budget.hours"] is not None else []
    if run["budget.usd"] is not None and price.usd_per_device_hour > 0:
        limits.append(run["budget.usd"] / price.usd_per_device_hour)
    return min(limits) if limits else None


def _calibrated(run: RunConfig, measured: Calibration, bound: StepBound, devices: int, price: Price) -> _Outcome:
    """Time by a measured run: every phase over what it has to do, and the budget's end where there is a budget."""
    notes = []
    heldout = heldout_tokens(run)
    if heldout is None:
        heldout = measured.heldout_tokens
        notes.append(f"the data are not prepared: {heldout:,} held-out tokens, as in the calibrating run")
    least = bound.data_parallel + bound.expert_parallel if devices > 1 else 0.0

    def phases(tokens: float) -> Phases:
        return _phases(run, measured, tokens, heldout, least, devices)

    tokens = float(run.tokens)
    hours = _budget_hours(run, price)
    if hours is not None:
        limit = hours * 3600 / devices
        limit -= max(MARGIN * limit, MARGIN_SECONDS)  # what a run aims to leave
        tokens = _most_tokens(tokens, lambda count: sum(phases(count).values()) <= limit)
    planned = phases(tokens)
    peak = known_hardware(measured.device).bf16_tflops * 1e12
    value = train_flops_per_token(run.model, run.seq_len) * tokens / (planned["train"] * devices * peak)
    # where a budget ends the run, a slower device sees fewer tokens and costs the same
    spread = CALIBRATED_SPREAD if tokens >= run.tokens else MARGIN
    efficiency = Efficiency(
        name="calibration",
        value=value,
        low=value * (1 - CALIBRATED_SPREAD),
        high=value * (1 + CALIBRATED_SPREAD),
        date=measured.date,
        source=f"{measured.run} on {measured.num_devices} {measured.device}",
    )
    assumption = f"the device runs within {CALIBRATED_SPREAD:.0%} as fast as in {measured.run} on {measured.date}"
    return _Outcome(
        tokens=tokens,
        phases=planned,
        low=1 - spread,
        high=1 + spread,
        efficiency=efficiency,
        assumption=assumption,
        base_memory_gb=measured.base_memory_gb,
        notes=tuple(notes),
    )


def _phases(run: RunConfig, measured: Calibration, tokens: float, heldout: int, least: float, devices: int) -> Phases:
    """Return the seconds of each phase of a run on a number of tokens."""
    steps, parameters = run.steps(tokens), trained_params(run.model)
    train = training_flops(run, tokens) * measured.train_seconds_per_flop / devices + steps * least
    forward = forward_flops_per_token(run.model, run.seq_len, include_mtp=False)
    validated = validation_tokens(run, tokens, heldout, devices) * forward
    saves = num_checkpoints(run, steps, train + measured.startup_seconds)
    return {
        "startup": measured.startup_seconds,
        "data": tokens * measured.data_seconds_per_token / devices,
        "train": train,
        "validate": validated * measured.validate_seconds_per_flop / devices,
        "checkpoint": saves * parameters * measured.checkpoint_seconds_per_parameter,
        "export": parameters * measured.export_seconds_per_parameter,
        "idle": measured.idle_seconds,
    }


def _most_tokens(most: float, fits: Any) -> float:
    """Return the most tokens that fit, by bisection."""
    if fits(most):
        return most
    low, high = 0.0, most
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if low < 1:
        raise ValueError("budget ends before the first token, expected more than the start of the run takes")
    return low


def _report(
    run: RunConfig, hardware: Hardware, fit: Fit, bound: StepBound, price: Price, outcome: _Outcome
) -> dict[str, Any]:
    layout, usd = fit.layout, price.usd_per_device_hour
    devices = layout.num_devices
    seconds = sum(outcome.phases.values())
    hours = seconds * devices / 3600
    low_price, price_note = _lowest_price(price)
    by_price = usd > 0 and usd / low_price > outcome.high / outcome.low
    return {
        "config": list(run.files),
        "device": hardware.device,
        "num_devices": devices,
        "parameters": param_count(run.model),
        "parameters_with_mtp": param_count(run.model, include_mtp=True),
        "active_parameters": active_param_count(run.model),
        "flops_per_token": train_flops_per_token(run.model, run.seq_len),
        "seq_len": run.seq_len,
        "tokens": round(outcome.tokens),
        "steps": round(run.steps(outcome.tokens)),
        **{key: value for key, value in asdict(layout).items() if key != "num_devices"},
        "runs_today": layout.runs_today,
        "micro_rows": fit.micro_rows,
        "memory_gb": _memory_gb(fit, hardware, outcome.base_memory_gb),
        "step_bound_seconds": bound.to_dict(),
        "efficiency": asdict(outcome.efficiency),
        "tokens_per_second": outcome.tokens / (outcome.phases["train"] + outcome.phases.get("data", 0.0)),
        "phases": {
            phase: {"seconds": value, "device_hours": value * devices / 3600, "usd": value * devices / 3600 * usd}
            for phase, value in outcome.phases.items()
        },
        "wall_seconds": seconds,
        "device_hours": hours,
        "device_hours_low": hours * outcome.low,
        "device_hours_high": hours * outcome.high,
        "usd": hours * usd,
        "usd_low": hours * outcome.low * low_price,
        "usd_high": hours * outcome.high * usd,
        "usd_per_million_tokens": hours * usd / outcome.tokens * 1e6,
        "price": asdict(price),
        "assumption": price_note if by_price else outcome.assumption,
        "notes": _notes(run, hardware, fit, outcome),
    }


def _memory_gb(fit: Fit, hardware: Hardware, base: float) -> dict[str, float]:
    parts = {**fit.memory.to_dict(), "base": base}
    parts["total"] += base
    return {**parts, "available": hardware.links.memory_gb, "usable_share": USABLE}


def _notes(run: RunConfig, hardware: Hardware, fit: Fit, outcome: _Outcome) -> list[str]:
    notes = [*fit.notes, *outcome.notes]
    if not fit.layout.runs_today and not fit.notes:
        notes.append("this package trains data-parallel without ZeRO so far: the layout is for comparison")
    if run["trainer.precision"] is None and hardware.device != "cpu":
        notes.append("the config gives no precision: bf16-mixed is planned")
    return notes


def _lowest_price(price: Price) -> tuple[float, str]:
    """Return the spot price where the price is the list's on-demand one and there is one, and what to say of it."""
    if price.source == "user" or price.market == "spot":
        return price.usd_per_device_hour, ""
    try:
        spot = find_price(price.device, market="spot").usd_per_device_hour
    except ValueError:  # not every device is offered so
        return price.usd_per_device_hour, ""
    return spot, (
        f"the devices are paid on demand at {price.usd_per_device_hour:g} dollars an hour ({price.date}), not at the "
        f"spot price of {spot:g}"
    )
