"""What claimed device-hours imply in speed and price, beside what others measured of the same work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from ds_lightning.config import DeepSeekConfig
from ds_lightning.cost.claims import Claim, Part
from ds_lightning.cost.figures import Figure
from ds_lightning.cost.prices import Hardware, find_hardware, find_price
from ds_lightning.flops import train_flops_per_token

MODELS_DIR = Path(__file__).resolve().parents[1] / "configs" / "model"

SECONDS = Figure.exact(3600)
MILLION, TERA = Figure.exact(10**6), Figure.exact(10**12)


def implied_figures(claim: Claim, figure: Callable[[Part], Figure]) -> dict[str, Figure]:
    """Return what the claimed hours imply; each figure carries the rounding of the figures it comes from.

    Where the claim states no price, dollars are at the newest listed price of the device.

    Args:
        claim: The claim.
        figure: Gives the figure of a part of it.

    Raises:
        ValueError: If the model's config is wrong, the device has no price, or a line divides by zero.
    """
    given = claim.implied
    if not given:
        return {}
    stated = {key: figure(given[key]) for key in ("tokens", "device_hours", "samples", "num_devices") if key in given}
    for key, value in stated.items():
        if value.low <= 0:
            raise ValueError(f"{claim.path}: implied: {key} is {value.number}, expected more than 0")
    found: dict[str, Figure] = {}
    if "usd_per_device_hour" in given:
        found["usd_per_device_hour"] = figure(given["usd_per_device_hour"])
    elif "tokens" in given or "samples" in given:
        found["usd_per_device_hour"] = Figure.exact(find_price(given["device"]).usd_per_device_hour)
    if "tokens" in given:
        tokens, hours = stated["tokens"], stated["device_hours"]
        found["tokens_per_second_per_device"] = tokens / (hours * SECONDS)
        found["device_hours_per_trillion_tokens"] = hours * TERA / tokens
        found["usd_per_million_tokens"] = hours * found["usd_per_device_hour"] * MILLION / tokens
        found |= _utilization(claim, figure, found["tokens_per_second_per_device"])
        if "num_devices" in given:
            found["days"] = hours / (stated["num_devices"] * Figure.exact(24))
    if "samples" in given:
        hours = figure(given["sample_device_hours"])
        found["device_seconds_per_sample"] = hours * SECONDS / stated["samples"]
        found["usd_per_sample"] = hours * found["usd_per_device_hour"] / stated["samples"]
    return found


def _utilization(claim: Claim, figure: Callable[[Part], Figure], speed: Figure) -> dict[str, Figure]:
    """Return FLOPs a token, TFLOP/s a device and shares of its dense peaks, under each way of counting."""
    given = claim.implied
    if "model" in given:
        counted = _model_flops(claim, given["model"], given["seq_len"])
    elif "flops_per_token" in given:
        counted = {"": figure(given["flops_per_token"])}
    else:
        return {}
    hardware = find_hardware(given["device"])
    first = next(iter(counted.values()))
    found = {"flops_per_token": first, "tflops_per_device": speed * first / TERA}
    if hardware is None:
        return found
    for counting, flops in counted.items():
        found[f"mfu_bf16{counting}"] = speed * flops / (Figure.exact(hardware.bf16_tflops) * TERA)
    if hardware.fp8_tflops is not None:
        found["mfu_fp8"] = speed * first / (Figure.exact(hardware.fp8_tflops) * TERA)
    return found


def _model_flops(claim: Claim, model: str, seq_len: int) -> dict[str, Figure]:
    """Return the FLOPs of training on a token; first what the work really is: causal attention, with its MTP."""
    path = claim.path.parent / model if model.endswith((".yaml", ".yml")) else MODELS_DIR / f"{model}.yaml"
    if not path.is_file():
        raise ValueError(f"{claim.path}: implied: model is {model!r}, expected a name in configs/model or a .yaml file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is {type(content).__name__}, expected the fields of a model's config")
    try:
        config = DeepSeekConfig.from_dict(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    ways = {"": (True, True), "_full_attention": (False, True)}
    if config.num_nextn_predict_layers:
        ways["_without_mtp"] = (True, False)
    return {
        name: Figure.exact(train_flops_per_token(config, seq_len, causal=causal, include_mtp=mtp))
        for name, (causal, mtp) in ways.items()
    }


def measured_figures(
    claim: Claim, figure: Callable[[Part], Figure], implied: dict[str, Figure]
) -> list[dict[str, Any]]:
    """Return the measurements of others as JSON-ready values, each with the claim's speed over theirs.

    Args:
        claim: The claim.
        figure: Gives the figure of a part of it.
        implied: Of :func:`implied_figures`.

    Raises:
        ValueError: If the claim implies no figure of the measurement's kind, or a measured figure is not positive.
    """
    claimed_on = find_hardware(claim.implied["device"]) if claim.implied else None
    rows = []
    for entry in claim.measured:
        value = figure(entry.value)
        where = f"{claim.path}: measured: {entry.system!r}: {entry.kind}"
        if value.low <= 0:
            raise ValueError(f"{where} is {value.number}, expected more than 0")
        if entry.kind not in implied:
            raise ValueError(f"{where} has nothing to stand beside, expected what it needs under implied")
        claimed = implied[entry.kind]
        ratio = value / claimed if entry.kind == "device_seconds_per_sample" else claimed / value
        hardware = find_hardware(entry.device)
        rows.append(
            {
                "system": entry.system,
                "device": entry.device,
                entry.kind: value.number,
                "claim_over_measured": float(ratio.value),
                "usd_per_device_hour_at_parity": float((implied["usd_per_device_hour"] / ratio).value),
                **_measured_speed(entry.kind, value, implied, hardware),
                "independent": not entry.own,
                "same_peak": _same_peak(hardware, claimed_on),
                "source": f"{claim.sources[entry.source]['title']}, {entry.at}",
                "read": claim.sources[entry.source]["read"],
                "note": entry.note,
            }
        )
    return rows


def _measured_speed(
    kind: str, value: Figure, implied: dict[str, Figure], hardware: Hardware | None
) -> dict[str, float]:
    found = {}
    tflops = value if kind == "tflops_per_device" else None
    if kind == "tokens_per_second_per_device":
        found["device_hours_per_trillion_tokens"] = float((TERA / (value * SECONDS)).value)
        if "flops_per_token" in implied:
            tflops = value * implied["flops_per_token"] / TERA
    if tflops is not None and hardware is not None:
        found["mfu_bf16"] = float((tflops / Figure.exact(hardware.bf16_tflops)).value)
    return found


def _same_peak(one: Hardware | None, other: Hardware | None) -> bool:
    return one is not None and other is not None and one.bf16_tflops == other.bf16_tflops
