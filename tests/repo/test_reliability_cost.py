"""The figures of ``scripts/reliability_cost``. The oracle: steps whose seconds are given, sums by hand."""

import importlib.machinery
import importlib.util
import json
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
KINDS = ["neither", "agreement", "neither again", "filter"]


def loaded(name: str) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(Path(name).stem, str(ROOT / "scripts" / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


COST, STEPS = loaded("reliability_cost"), loaded("reliability_steps.py")


def noted(cycles: int, seconds: dict[str, float]) -> dict[str, Any]:
    """What a rank notes of cycles of steps that take as long as given."""
    kinds = KINDS * cycles
    ends = list(accumulate(seconds[kind] for kind in kinds))
    return {"ends": ends, "variants": kinds, "threads": 1, "call_seconds": 0.001}


def saves(last: int, seconds: float) -> dict[str, Any]:
    """What a process notes of steps of a second, with a save in each fourth of them."""
    part = [seconds if step % 4 == 0 else 0.0 for step in range(1, last + 1)]
    return {"ends": list(accumulate(1 + extra for extra in part)), "save_part": part, "threads": 2}


def test_a_window_begins_with_the_step_that_saves() -> None:
    found = COST.windows(saves(11, 0.5)["ends"], 4)
    assert found == [(2.5, 2.0), (2.5, 2.0)]


@pytest.mark.parametrize(("last", "windows"), [(6, 0), (7, 1), (10, 1), (11, 2)])
def test_a_window_that_is_not_whole_does_not_count(last: int, windows: int) -> None:
    assert len(COST.windows(saves(last, 0.5)["ends"], 4)) == windows


def test_a_save_of_six_tenths_of_a_second_is_a_hundredth_of_a_minute() -> None:
    cost = COST.cost_of_saves(saves(11, 0.6), 4)
    assert cost["seconds"] == [0.6, 0.6]
    assert cost["share"] == pytest.approx(0.01)
    assert cost["share_by_windows"] == pytest.approx(0.01)
    assert cost["step_seconds"] == pytest.approx(1.0)


def test_steps_are_compared_with_the_one_of_their_cycle_that_has_neither() -> None:
    steps = {"neither": 1.0, "agreement": 1.02, "neither again": 0.99, "filter": 1.05}
    cost = COST.cost_of_agreement(noted(6, steps))
    assert cost["cycles"] == 4
    assert cost["step_seconds"] == pytest.approx(steps)
    assert cost["share"] == pytest.approx({"agreement": 0.02, "neither again": -0.01, "filter": 0.05})
    assert cost["share_by_call"] == pytest.approx(0.001)


def test_every_cycle_has_each_kind_once_and_no_kind_keeps_its_place() -> None:
    kinds = [STEPS.variant(step) for step in range(16)]
    assert all(sorted(kinds[start : start + 4]) == sorted(KINDS) for start in range(0, 16, 4))
    assert all(sorted(kinds[place::4]) == sorted(KINDS) for place in range(4))


@pytest.mark.parametrize(
    ("save", "agreement", "status", "missed"),
    [(1.7, 0.009, 0, "none"), (1.9, 0.009, 1, "save"), (1.7, 0.011, 1, "agreement")],
)
def test_a_bar_that_is_missed_is_named_and_gives_status_1(
    save: float,
    agreement: float,
    status: int,
    missed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = {"neither": 1.0, "agreement": 1 + agreement, "neither again": 1.0, "filter": 1.0}
    results = tmp_path / "results.json"
    monkeypatch.setattr(COST, "run", lambda out, ranks, **_: saves(11, save) if ranks == 1 else noted(6, steps))
    options = ["--window", "2", "--out", str(tmp_path), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", ["reliability_cost", *options])
    assert COST.main() == status
    assert f"not below their bars: {missed}\n" in capsys.readouterr().out
    assert json.loads(results.read_text())["ranks"]["share"]["agreement"] == pytest.approx(agreement)


@pytest.mark.parametrize("option", ["--saves", "--window", "--cycles"])
def test_a_number_that_is_too_small_is_refused_in_a_line(option: str) -> None:
    command = [sys.executable, str(ROOT / "scripts/reliability_cost"), option, "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{option} is 0, expected at least {2 if option == '--window' else 1}\n" in done.stderr
