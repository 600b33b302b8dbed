"""Curves of a run against its dollars, read from the event files of TensorBoard."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader  # type: ignore[import-untyped]
from tensorboard.util import tensor_util  # type: ignore[import-untyped]

CURVES = (
    "train/loss",
    "val/loss",
    "val/bits_per_byte",
    "val/pass_at_1",
    "val/pass_at_1_greedy",
    "val/completion_length",
    "reward",
    "frac_reward_zero_std",
    "completions/mean_length",
    "moe/max_violation",
)
"""What a report may draw."""

MOST_POINTS = 200
"""Points of a curve that are kept; a chart is not wider."""

Curve = list[tuple[float, float]]
"""Dollars and value, in the order of training."""


def read_curves(run_dir: Path) -> dict[str, Curve]:
    """Return what a run logged of :data:`CURVES`, each value with the dollars spent until then.

    Of a step that several attempts logged the last value counts. Dollars between two records of ``cost/usd`` are
    interpolated by step. Without event files, as of a run with another logger, there are no curves.

    Args:
        run_dir: The run's folder.
    """
    points: dict[str, dict[int, float]] = {}
    for file in sorted((run_dir / "tensorboard").glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag == "cost/usd" or value.tag in CURVES:
                    points.setdefault(value.tag, {})[event.step] = float(tensor_util.make_ndarray(value.tensor))
    spent = sorted(points.pop("cost/usd", {}).items())
    if not spent:
        return {}
    return {
        tag: thinned([(dollars_at(spent, step), value) for step, value in sorted(points[tag].items())])
        for tag in CURVES
        if tag in points
    }


def dollars_at(spent: list[tuple[int, float]], step: int) -> float:
    """Return the dollars at a step, linear between the recorded ones; before and after them the nearest."""
    after = bisect_right(spent, (step, float("inf")))
    if after == 0 or after == len(spent):
        return spent[max(0, after - 1)][1]
    (first, low), (last, high) = spent[after - 1], spent[after]
    return low + (high - low) * (step - first) / (last - first)


def thinned(curve: Curve) -> Curve:
    """Return a curve of at most :data:`MOST_POINTS` points, evenly chosen, with both ends."""
    if len(curve) <= MOST_POINTS:
        return curve
    last = len(curve) - 1
    return [curve[round(index * last / (MOST_POINTS - 1))] for index in range(MOST_POINTS)]
