"""Energy in the ledger. Oracles: sums by hand over counters that the test moves; a stand-in for NVIDIA's library."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from ds_lightning.cost import Ledger, ledger_report, ledger_table, read_ledger
from ds_lightning.cost.energy import EnergyMeter, nvml_meter
from ds_lightning.cost.ledger import _abandon_all
from ds_lightning.report import read_run_data
from ds_lightning.report.sections import bill
from tests.cost.test_ledger import DOLLAR, Clock, spend


class Counters:
    """Two devices' millijoules, which move only when told."""

    def __init__(self) -> None:
        self.millijoules = [5_000_000, 70]

    def meter(self) -> EnergyMeter:
        return EnergyMeter([lambda: self.millijoules[0], lambda: self.millijoules[1]])

    def take(self, joules: float) -> None:
        """Let each of the devices take half."""
        self.millijoules = [value + round(500 * joules) for value in self.millijoules]


def start(path: Path, clock: Clock, meter: EnergyMeter | None, num_devices: int = 2) -> Ledger:
    return Ledger.open(
        path, DOLLAR, num_devices=num_devices, clock=clock, started_ns=clock.now, background=False, meter=meter
    )


def test_the_records_add_up_to_what_the_counters_moved(tmp_path: Path) -> None:
    clock, counters = Clock(), Counters()
    ledger = start(tmp_path / "ledger.jsonl", clock, counters.meter())
    for joules in (1000, 26_000, 0):
        spend(ledger, clock, "train", 100)
        counters.take(joules)
        ledger.flush()
    clock.sleep(60)
    counters.take(9000)
    ledger.close()
    records = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [record["joules"] for record in records] == [0, 1000, 26_000, 0, 9000]
    assert {record["metered_devices"] for record in records} == {2}
    assert ledger_report(tmp_path)["energy"] == {"kwh": pytest.approx(0.01), "metered_device_hours": 2 * 0.1}


def test_what_a_killed_attempt_took_is_in_its_heartbeat_and_counted_once(tmp_path: Path) -> None:
    clock, counters = Clock(), Counters()
    ledger = start(tmp_path / "ledger.jsonl", clock, counters.meter())
    spend(ledger, clock, "train", 10)
    counters.take(500)
    ledger.flush()
    spend(ledger, clock, "train", 10)
    counters.take(700)
    ledger._measure()
    ledger._beat()
    assert ledger_report(tmp_path)["energy"]["kwh"] == pytest.approx(1200 / 3.6e6)
    _abandon_all()  # killed: nothing more is written
    start(tmp_path / "ledger.jsonl", clock, counters.meter()).close()
    assert read_ledger(tmp_path / "ledger.jsonl").joules == 1200
    assert ledger_report(tmp_path)["energy"]["metered_device_hours"] == pytest.approx(2 * 20 / 3600)


def test_time_without_a_meter_is_told_apart(tmp_path: Path) -> None:
    clock, counters = Clock(), Counters()
    for meter in (counters.meter(), None):
        ledger = start(tmp_path / "ledger.jsonl", clock, meter, num_devices=4)
        clock.sleep(1800)
        counters.take(360_000)
        ledger.close()
    report = ledger_report(tmp_path)
    assert report["energy"] == {"kwh": pytest.approx(0.1), "metered_device_hours": 1}
    caption = " ".join(str(ledger_table(report).caption).split())
    assert "0.1 kWh by the counters of the GPUs in 1 of 4 device-hours" in caption
    assert "0.1 kWh by the counters of the GPUs in 1 of 4 device-hours." in bill(read_run_data(tmp_path))


def test_a_ledger_without_energy_says_nothing_of_it(tmp_path: Path) -> None:
    clock = Clock()
    start(tmp_path / "ledger.jsonl", clock, None).close()
    console = Console(width=100, record=True, file=(tmp_path / "out").open("w"))
    console.print(ledger_table(ledger_report(tmp_path)))
    assert "kWh" not in console.export_text()
    assert "joules" not in (tmp_path / "ledger.jsonl").read_text()
    report = ledger_report(tmp_path)
    del report["energy"]  # as in a report.json of before
    assert "kWh" not in str(ledger_table(report).caption)


@pytest.mark.parametrize("joules", [-1, "many"])
def test_energy_that_no_meter_writes_is_refused(tmp_path: Path, joules: Any) -> None:
    from ds_lightning.cost.records import encode_record, record_hash

    path, clock = tmp_path / "ledger.jsonl", Clock()
    start(path, clock, Counters().meter()).close()
    *before, last = [json.loads(line) for line in path.read_text().splitlines()]
    last["joules"] = joules
    last["hash"] = record_hash(last)
    path.write_bytes(b"".join(map(encode_record, [*before, last])))
    with pytest.raises(ValueError, match=rf"line 2 has joules {joules!r} and .*, expected numbers of at least 0"):
        read_ledger(path)


class NVMLError(Exception):
    """The library's own."""


def fake_nvml(**changes: Any) -> SimpleNamespace:
    joules = {"GPU-a": 3000, "GPU-b": 500}

    def take(handle: str) -> int:
        joules[handle] += 250
        return joules[handle]

    return SimpleNamespace(
        **{
            "NVMLError": NVMLError,
            "nvmlInit": lambda: None,
            "nvmlDeviceGetHandleByUUID": lambda uuid: {"GPU-a": "GPU-a", "GPU-b": "GPU-b"}[uuid],
            "nvmlDeviceGetTotalEnergyConsumption": take,
            **changes,
        }
    )


def test_the_library_is_asked_for_the_devices_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    meter = nvml_meter(["GPU-b", "a"])
    assert meter is not None
    assert meter.num_devices == 2
    assert [meter.read(), meter.read()] == [0.5, 1.0]


def test_a_library_that_is_missing_or_fails_leaves_energy_out_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> int:
        raise NVMLError("Not Supported")

    for name in ("nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"):
        monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(**{name: fail}))
        caplog.clear()
        assert nvml_meter(["a"]) is None
        assert caplog.messages == ["the energy of the GPUs is not booked: NVML says Not Supported"]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with caplog.at_level(logging.INFO):
        assert nvml_meter(["a"]) is None
    assert "pip install 'ds-lightning[gpu]'" in caplog.messages[-1]


def test_a_counter_that_fails_or_begins_anew_changes_nothing_that_was_read() -> None:
    readings: list[Any] = [1000, 4000, NVMLError("lost"), 500, 6000]

    def counter() -> int:
        value = readings.pop(0)
        if isinstance(value, Exception):
            raise value
        return int(value)

    meter = EnergyMeter([counter], NVMLError)
    assert [meter.read() for _ in range(4)] == [3.0, 3.0, 3.0, 5.0]
