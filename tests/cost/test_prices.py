"""Oracles: the published prices and peaks, written out here a second time, and files made wrong on purpose."""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path

import pytest

from ds_lightning.cost.prices import PRICES_DIR, Market, Price, find_hardware, find_price, read_hardware, read_prices

GOOD = "{device: x, usd_per_device_hour: 1, market: spot, date: 2026-01-02, source: me}"


def test_the_reports_price_of_an_h800_is_two_dollars() -> None:
    price = find_price("H800")
    assert (price.device, price.usd_per_device_hour, price.market) == ("h800", 2.0, "on-demand")
    assert "2412.19437" in price.source


@pytest.mark.parametrize(
    ("device", "market", "usd"),
    [("h100", "on-demand", 2.95), ("h100", "spot", 1.25), ("h200", "on-demand", 3.5), ("cpu", "on-demand", 0.0496)],
)
def test_listed_prices(device: str, market: Market, usd: float) -> None:
    assert find_price(device, market=market).usd_per_device_hour == usd


def test_every_list_that_ships_is_readable_and_dated() -> None:
    lists = sorted(PRICES_DIR.glob("[0-9]*.yaml"))
    assert lists
    for path in lists:
        for price in read_prices(path):
            assert datetime.date(2024, 1, 1) <= datetime.date.fromisoformat(price.date)
            assert price.source


def test_a_users_price_needs_no_list() -> None:
    price = find_price("my-laptop", usd_per_device_hour=0)
    assert (price.usd_per_device_hour, price.source) == (0, "user")
    assert price.date == datetime.datetime.now(datetime.UTC).date().isoformat()


def test_a_missing_price_names_the_device_its_neighbour_and_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"'h20'.*did you mean h200\?.*b200 \(on-demand\).*set usd_per_device_hour"):
        find_price("h20")
    with pytest.raises(ValueError, match="no spot price for device 'b200'"):
        find_price("b200", market="spot")


@pytest.mark.parametrize("usd", [-0.01, float("nan"), float("inf"), True, "2"])
def test_impossible_prices_are_refused(usd: float) -> None:
    with pytest.raises(ValueError, match=r"usd_per_device_hour of h100 is .* expected a finite number of at least 0"):
        find_price("h100", usd_per_device_hour=usd)


def test_an_unknown_market_and_a_wrong_date_are_refused() -> None:
    with pytest.raises(ValueError, match="market of a is 'barter'"):
        Price(device="a", usd_per_device_hour=1, market="barter", date="2026-01-01", source="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="date of a is 'May', expected YYYY-MM-DD"):
        Price(device="a", usd_per_device_hour=1, date="May", source="x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prices: [", "is not YAML"),
        ("[]", "has no list under 'prices'"),
        ("prices: []", "has no list under 'prices'"),
        (f"prices: [{GOOD}, 3]", "entry 2 of 'prices' has 3"),
        ("prices: [{device: x}]", "entry 1 of 'prices' has device; expected device, usd_per_device_hour"),
        ("prices: [" + GOOD.replace("1,", "-1,") + "]", "usd_per_device_hour of x is -1"),
    ],
)
def test_a_malformed_list_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        find_price("x", file=path)


def test_the_newest_price_of_a_list_wins(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    newer = GOOD.replace("2026-01-02", "2026-02-01").replace("hour: 1", "hour: 7")
    path.write_text(f"prices: [{newer}, {GOOD}]")
    assert find_price("x", market="spot", file=path).usd_per_device_hour == 7


def test_peaks_are_dense_and_found_by_both_names() -> None:
    by_name, by_device = find_hardware("NVIDIA H100 80GB HBM3"), find_hardware("h100")
    assert by_name == by_device
    assert by_name is not None
    assert (by_name.bf16_tflops, by_name.fp8_tflops) == (989.5, 1979)
    peaks = {hardware.device: hardware.bf16_tflops for hardware in read_hardware()}
    assert peaks == {
        "h100": 989.5,
        "h800": 989.5,
        "h200": 989.5,
        "b200": 2250,
        "gb200": 2500,
        "a100": 312,
        "l40s": 362.05,
        "rtx4090": 165.2,
        "cpu": 0.4,
    }
    assert find_hardware("NVIDIA H100 PCIe") is None


def test_prices_and_ledger_load_neither_torch_nor_lightning() -> None:
    code = "import sys, ds_lightning.cost; print([m for m in ('torch', 'lightning') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_memory_and_links_of_devices() -> None:
    h800, h100 = find_hardware("h800"), find_hardware("h100")
    assert h800 is not None
    assert h100 is not None
    assert (h800.links.node_gb_per_s, h800.links.network_gb_per_s) == (160, 50)  # arXiv:2412.19437, section 3.2.2
    assert (h100.links.memory_gb, h100.links.memory_gb_per_s, h100.links.node_devices) == (80, 3350, 8)
    assert all(hardware.links.memory_gb > 0 for hardware in read_hardware())
