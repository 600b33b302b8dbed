"""Oracles: the order of calls, written out by hand; the table's text."""

import torch
from rich.console import Console

from ds_lightning.bench.contest import contest_table, figures, in_turns


def test_the_side_that_begins_changes_and_the_first_round_is_left_out() -> None:
    calls = list[str]()

    def side(name: str, seconds: float) -> float:
        calls.append(name)
        return seconds + len(calls)

    seconds = in_turns({"a": lambda: side("a", 0), "b": lambda: side("b", 100)}, 2)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert seconds == {"a": [4, 5], "b": [103, 106]}


def test_the_ratio_is_to_the_best_peer() -> None:
    model = torch.nn.Linear(3, 2)
    seconds = {"ds_lightning": [1.0, 2.0, 9.0], "peer x": [5.0, 4.0, 4.0], "peer y": [8.0, 8.0, 1.0]}
    measured = figures(model, "cpu", seconds, 400, "samples")  # type: ignore[arg-type]  # any module has parameters
    assert measured["samples_per_second"] == {"ds_lightning": 200, "peer x": 100, "peer y": 50}
    assert measured["ratio"] == 2
    assert measured["parameters"] == 8
    console = Console(width=120, record=True)
    console.print(contest_table({**measured, "repeats": 3}, "grpo", "some settings", "samples"))
    text = console.export_text()
    assert "8 parameters, some settings, fp32" in text
    assert "samples a second" in text
    assert "50.0" in text
