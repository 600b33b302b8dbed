"""A page over many runs, the best for its money first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.table import Table

from ds_lightning.report.charts import sparkline
from ds_lightning.report.page import document
from ds_lightning.report.results import main_curve, result_of, without_gradient
from ds_lightning.report.run_data import PAGE, RunData
from ds_lightning.report.text import hours, percent, safe, usd

GALLERY = "gallery.html"
"""Name of the page where none is given."""

_KINDS = ("pass@1", "bits per byte", None)
"""Results that cannot be compared with each other, in the order of the page."""


def run_row(run: RunData) -> dict[str, Any]:
    """Return the figures of a run as JSON-ready values; ``usd_per_result`` is dollars per ``unit``."""
    result = result_of(run)
    return {
        "run": str(run.folder),
        "kind": None if result is None else result.kind,
        "result": None if result is None else result.value,
        "usd": run.usd,
        "device_hours": run.device_hours,
        "usd_per_result": None if result is None else result.usd_per_unit,
        "unit": None if result is None else result.unit,
        "share_without_gradient": sum(without_gradient(run).values()) / run.usd if run.usd else 0.0,
    }


def ranked(runs: Sequence[RunData]) -> list[RunData]:
    """Return runs by dollars per result, of one kind of result after the other; unfinished ones last."""

    def rank(run: RunData) -> tuple[int, bool, float]:
        row = run_row(run)
        each = row["usd_per_result"]
        return _KINDS.index(row["kind"]), each is None, row["usd"] if each is None else each

    return sorted(runs, key=rank)


def gallery_page(runs: Sequence[RunData], path: Path) -> str:
    """Return the gallery, with links from its place to the pages of the runs that have one."""
    cards = "".join(_card(number, run, path) for number, run in enumerate(ranked(runs), start=1))
    spent = sum(run.usd for run in runs)
    head = (
        f'<header><p class="over">gallery</p><h1><b>{len(runs)}</b> <span>runs for {usd(spent)}</span></h1></header>'
        '<p class="said">Sorted by dollars per result: a point of pass@1, or a bit saved per byte of held-out text.</p>'
    )
    return document("Runs by dollars per result", f'{head}<ol class="gallery">{cards}</ol>')


def _card(number: int, run: RunData, path: Path) -> str:
    row, (metric, points) = run_row(run), main_curve(run)
    name = safe(run.name)
    if (run.folder / PAGE).is_file():
        link = quote(Path(os.path.relpath(run.folder / PAGE, path.parent)).as_posix())
        name = f'<a href="{link}">{name}</a>'
    each = "" if row["usd_per_result"] is None else f"<b>{usd(row['usd_per_result'])}</b> a {safe(row['unit'])}"
    facts = (
        f"{usd(row['usd'])}, {hours(row['device_hours'])} device-hours, "
        f"{percent(row['share_without_gradient'])} without a gradient"
    )
    return (
        f'<li><i class="number">{number}</i><div><h2>{name}</h2><p>{safe(_result(row))}</p></div>'
        f'<div class="spark">{sparkline(points, f"{metric} of {run.name} against dollars")}</div>'
        f'<div class="price"><p>{each}</p><p class="said">{safe(facts)}</p></div></li>'
    )


def _result(row: dict[str, Any]) -> str:
    if row["kind"] is None:
        return "not finished"
    return f"{percent(row['result'])} pass@1" if row["kind"] == "pass@1" else f"{row['result']:.3f} bits/byte"


def report_table(runs: Sequence[RunData]) -> Table:
    """Return the figures of runs as a table to print, the best for its money first."""
    table = Table(caption="usd/result: a point of pass@1, or a bit saved per byte; no grad: dollars without a gradient")
    table.add_column("run")
    for name in ("result", "usd", "device-hours", "usd/result", "no grad"):
        table.add_column(name, justify="right")
    for run in ranked(runs):
        row = run_row(run)
        each = "" if row["usd_per_result"] is None else usd(row["usd_per_result"])
        figures = (_result(row), usd(row["usd"]), hours(row["device_hours"]), each)
        table.add_row(run.name, *figures, percent(row["share_without_gradient"]))
    return table
