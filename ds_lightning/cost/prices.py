"""What a device costs an hour and what it can compute: dated facts from YAML, each with its source."""

from __future__ import annotations

import datetime
import difflib
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import yaml

PRICES_DIR = Path(__file__).resolve().parents[1] / "configs" / "prices"

Market = Literal["on-demand", "spot"]
MARKETS: tuple[Market, ...] = ("on-demand", "spot")


@dataclass(frozen=True, kw_only=True)
class Price:
    """Price of one device for one hour.

    Raises:
        ValueError: If the price is negative or not a number, or a text field is empty or unknown.
    """

    device: str
    """Device in lower case, as in the price list: ``h100``, ``cpu``."""
    usd_per_device_hour: float
    """US dollars for one device held for one hour. 0 is allowed: hardware that is already paid for."""
    market: Market = "on-demand"
    """Terms: ``on-demand``, or ``spot`` for capacity that can be taken away."""
    date: str
    """Day of the price, ``YYYY-MM-DD``."""
    source: str
    """Who says so."""

    def __post_init__(self) -> None:
        """Refuse what no bill could say."""
        usd = self.usd_per_device_hour
        if isinstance(usd, bool) or not isinstance(usd, int | float) or not math.isfinite(usd) or usd < 0:
            raise ValueError(f"usd_per_device_hour of {self.device} is {usd!r}, expected a finite number of at least 0")
        if self.market not in MARKETS:
            raise ValueError(f"market of {self.device} is {self.market!r}, expected 'on-demand' or 'spot'")
        try:
            datetime.date.fromisoformat(self.date)
        except (TypeError, ValueError):
            raise ValueError(f"date of {self.device} is {self.date!r}, expected YYYY-MM-DD") from None


@dataclass(frozen=True, kw_only=True)
class Links:
    """Memory of one device and its links to others, each a device and direction."""

    memory_gb: float
    """Memory in 1e9 bytes."""
    memory_gb_per_s: float
    """Bandwidth of that memory, reads and writes together."""
    node_devices: int
    """Devices that the faster link joins."""
    node_gb_per_s: float
    """Link to the other devices of the node."""
    network_gb_per_s: float
    """Link to other nodes."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What one device can do at most."""

    device: str
    """Device, as in the price list."""
    names: tuple[str, ...]
    """What ``torch.cuda.get_device_name`` calls it, exactly."""
    bf16_tflops: float
    """Dense peak in bfloat16, TFLOP/s."""
    fp8_tflops: float | None
    """Dense peak in FP8, TFLOP/s; none: no FP8 units."""
    source: str
    """Who says so."""
    links: Links
    """Memory and links."""


def find_price(
    device: str,
    *,
    market: Market = "on-demand",
    usd_per_device_hour: float | None = None,
    file: str | Path | None = None,
) -> Price:
    """Return the price of a device, from the list or as the user states it.

    Args:
        device: Device as in the list, in any case.
        market: ``on-demand`` or ``spot``.
        usd_per_device_hour: The user's own price; the list is then not read, and any device name will do.
        file: Price list to read; none: the newest that ships with the package.

    Raises:
        ValueError: If the list has no such price or is malformed; the message says what is known and what to set.
    """
    device = device.lower()
    if usd_per_device_hour is not None:
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        return Price(device=device, usd_per_device_hour=usd_per_device_hour, market=market, date=today, source="user")
    path = Path(file) if file is not None else _newest_list()
    known = read_prices(path)
    matches = [price for price in known if price.device == device and price.market == market]
    if matches:
        return max(matches, key=lambda price: price.date)
    offers = sorted({f"{price.device} ({price.market})" for price in known})
    near = difflib.get_close_matches(device, sorted({price.device for price in known}), n=1)
    hint = f"; did you mean {near[0]}?" if near and near[0] != device else "."
    raise ValueError(
        f"no {market} price for device {device!r} in {path.name}{hint} It has {', '.join(offers)}. "
        "Choose one of these or set usd_per_device_hour"
    )


def read_prices(file: str | Path) -> list[Price]:
    """Read a price list.

    Raises:
        ValueError: If the file is not a list of complete prices; the message names the entry.
    """
    known = ("device", "usd_per_device_hour", "market", "date", "source")
    prices = []
    for entry in read_entries(Path(file), "prices", known):
        entry["date"] = str(entry["date"])
        prices.append(Price(**entry))
    return prices


def read_hardware(file: str | Path | None = None) -> list[Hardware]:
    """Read what devices can do; ``file`` none: those that ship with the package.

    Raises:
        ValueError: If the file is not a list of complete entries; the message names the entry.
    """
    path = Path(file) if file is not None else PRICES_DIR / "hardware.yaml"
    known = ("device", "names", "bf16_tflops", "fp8_tflops", "source", "links")
    return [
        Hardware(**{**entry, "names": tuple(entry["names"]), "links": Links(**entry["links"])})
        for entry in read_entries(path, "hardware", known)
    ]


def find_hardware(name: str) -> Hardware | None:
    """Return the facts on a device by its list name or by the name that torch gives it; none if it is not listed."""
    for hardware in _shipped_hardware():
        if name.lower() == hardware.device or name in hardware.names:
            return hardware
    return None


def known_hardware(device: str) -> Hardware:
    """Return the facts on a device by its list name.

    Raises:
        ValueError: If it is not listed; the message names the nearest and all.
    """
    hardware = find_hardware(device)
    if hardware is None:
        known = sorted(hardware.device for hardware in _shipped_hardware())
        near = difflib.get_close_matches(device.lower(), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ","
        raise ValueError(f"device is {device!r}{hint} expected one of {', '.join(known)}")
    return hardware


@functools.cache
def _shipped_hardware() -> tuple[Hardware, ...]:
    return tuple(read_hardware())


def _newest_list() -> Path:
    """Lists are named by date, so the last name is the newest."""
    return max(PRICES_DIR.glob("[0-9]*.yaml"))


def read_entries(path: Path, key: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """Read a YAML file that holds one list of entries with the same keys.

    Raises:
        ValueError: If it is no such file, or says that its money is not in US dollars.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    currency = content.get("currency", "USD") if isinstance(content, dict) else "USD"
    if currency != "USD":
        raise ValueError(f"{path}: currency is {currency!r}, expected USD: convert the prices and date the conversion")
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} has no list under {key!r}, expected entries with {', '.join(fields)}")
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or set(entry) != set(fields):
            found = ", ".join(sorted(map(str, entry))) if isinstance(entry, dict) else repr(entry)
            raise ValueError(f"{path}: entry {number} of {key!r} has {found}; expected {', '.join(fields)}")
    return cast("list[dict[str, Any]]", entries)
