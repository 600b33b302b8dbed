"""A claim of three lines that is right, to be made wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

PRICE = {"name": "price", "published": "$2", "unit": "USD/device-hour", "date": "2026-01-02", "source": "a", "at": "1"}
HOURS = {"name": "hours", "published": "10", "unit": "device-hours", "source": "a", "at": "1"}
COST = {"name": "cost", "published": "$20", "unit": "USD", "follows_from": {"product": ["hours", "price"]}}
GOOD: dict[str, Any] = {
    "claim": "It cost 20 dollars.",
    "sources": {"a": {"title": "A", "read": "primary"}},
    "lines": [PRICE, HOURS, {**COST, "source": "a", "at": "1"}],
    "excluded": [{"name": "people", "unit": "USD", "basis": "none"}],
    "totals": {"usd": "cost"},
    "implied": {"device": "h100", "tokens": 1000, "device_hours": "hours", "usd_per_device_hour": "price"},
    "measured": [{"system": "b", "device": "h100", "tokens_per_second_per_device": 5, "source": "a", "at": "2"}],
}
Change = Callable[[dict[str, Any]], object]


def write(folder: Path, change: Change = lambda values: None) -> Path:
    """Write the claim, changed, and return its file."""
    values = copy.deepcopy(GOOD)
    change(values)
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def line(number: int, **keys: Any) -> Change:
    """Return a change of some keys of one line."""
    return lambda values: values["lines"][number].update(keys)
