"""How much of its peak a device reaches in training: published speeds, and which of them a plan goes by."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_lightning.cost.prices import PRICES_DIR, Hardware, known_hardware, read_entries

COMPARABLE = 8.0
"""Factor between active parameters up to which published speeds count as those of a similar model."""


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Share of the dense bfloat16 peak that training reaches, and who says so."""

    name: str
    """Entry of the list; ``user`` or ``calibration`` where it does not come from there."""
    value: float
    """Model FLOPs over peak FLOPs, in (0, 1]."""
    low: float
    """The least of comparable figures."""
    high: float
    """The greatest of them."""
    date: str
    """Day of the figure, ``YYYY-MM-DD``."""
    source: str
    """Who says so, and of what."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A published speed."""

    name: str
    device: str
    value: float
    active_parameters: float
    date: str
    source: str


def read_efficiencies(file: str | Path | None = None) -> list[Measured]:
    """Read published speeds; ``file`` none: those that ship with the package.

    Raises:
        ValueError: If the file is malformed or names an unknown device.
    """
    path = Path(file) if file is not None else PRICES_DIR / "efficiencies.yaml"
    found = []
    for entry in read_entries(path, "efficiencies", ("name", "device", "measured", "date", "source")):
        speed = entry["measured"]
        peak = known_hardware(entry["device"]).bf16_tflops * 1e12
        value = speed["tokens_per_second"] * speed["flops_per_token"] / peak
        found.append(
            Measured(
                name=entry["name"],
                device=entry["device"],
                value=value,
                active_parameters=speed["active_parameters"],
                date=str(entry["date"]),
                source=entry["source"],
            )
        )
    return found


def choose_efficiency(
    hardware: Hardware, active_parameters: int, asked: str | float | None = None
) -> tuple[Efficiency, bool]:
    """Return the efficiency to plan with, and whether it was measured on this very device.

    Of similar models, in active parameters, the nearest on the device, else on one with the same peak; without any, the
    nearest on the device, else of all. The range is that of similar models on devices with the same peak, of any models
    if there are not two, and from half to double where there is a single figure.

    Args:
        hardware: The device.
        active_parameters: Those of the model to plan, without the embedding.
        asked: Name of an entry, or a number of your own in (0, 1].

    Raises:
        ValueError: If there is no such entry, or the number is no share of a peak.
    """
    known = _shipped_efficiencies()
    number = _number(asked)
    if number is not None:
        if not 0 < number <= 1:
            raise ValueError(f"efficiency is {asked}, expected a share of the peak above 0 and at most 1")
        own = Efficiency(name="user", value=number, low=number, high=number, date="", source="user")
        return own, True
    if asked is not None:
        chosen = next((entry for entry in known if entry.name == asked), None)
        if chosen is None:
            names = [entry.name for entry in known]
            near = difflib.get_close_matches(str(asked), names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ","
            raise ValueError(f"efficiency is {asked!r}{hint} expected a number or one of {', '.join(names)}")
    else:
        chosen = _nearest(known, hardware, active_parameters)
    same_peak = [entry for entry in known if _same_peak(entry, hardware)]
    similar = [entry for entry in same_peak if _similar(entry, active_parameters)]
    values = {chosen.value, *(entry.value for entry in (similar if len(similar) > 1 else same_peak))}
    if len(values) == 1:
        values |= {chosen.value / 2, min(1.0, chosen.value * 2)}
    efficiency = Efficiency(
        name=chosen.name,
        value=chosen.value,
        low=min(values),
        high=max(values),
        date=chosen.date,
        source=chosen.source,
    )
    return efficiency, chosen.device == hardware.device


def _nearest(known: Sequence[Measured], hardware: Hardware, active_parameters: int) -> Measured:
    similar = [entry for entry in known if _similar(entry, active_parameters)]
    groups = (
        [entry for entry in similar if entry.device == hardware.device],
        [entry for entry in similar if _same_peak(entry, hardware)],
        [entry for entry in known if entry.device == hardware.device],
        known,
    )
    candidates = next(group for group in groups if group)
    return min(candidates, key=lambda entry: abs(math.log(entry.active_parameters / active_parameters)))


def _similar(entry: Measured, active_parameters: int) -> bool:
    return 1 / COMPARABLE < entry.active_parameters / active_parameters < COMPARABLE


def _same_peak(entry: Measured, hardware: Hardware) -> bool:
    return known_hardware(entry.device).bf16_tflops == hardware.bf16_tflops


@functools.cache
def _shipped_efficiencies() -> tuple[Measured, ...]:
    return tuple(read_efficiencies())


def _number(asked: str | float | None) -> float | None:
    if asked is None:
        return None
    try:
        return float(asked)
    except ValueError:
        return None
