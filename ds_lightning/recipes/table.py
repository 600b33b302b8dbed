"""What a recipe brought and what it cost: the figures of its ``report.json``, and the table that grows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from ds_lightning.cost.ledger_report import LEDGER_NAME, figure, ledger_report
from ds_lightning.recipes.recipe import Recipe
from ds_lightning.summary import REPORT, read_report
from ds_lightning.whole_file import write_whole

SAMPLED = Path("samples") / "summary.json"
"""What rejection sampling says of itself, in the folder of a stage."""


def write_recipe_report(recipe: Recipe, run_dir: Path) -> dict[str, Any]:
    """Write ``report.json`` of a recipe: a row a stage that has begun, and the sums of all ledgers.

    Args:
        recipe: The recipe.
        run_dir: Its folder.

    Returns:
        The report.

    Raises:
        ValueError: If a ledger was tampered with, or the report of a stage is damaged.
    """
    ledger = ledger_report(run_dir)
    rows = []
    for stage in recipe.stages:
        folder = run_dir / stage.name
        if not (folder / LEDGER_NAME).is_file():
            continue
        row: dict[str, Any] = {"kind": None}
        if (folder / REPORT).is_file():
            row = dict(read_report(folder)["stages"][0])
            row["kind"] = row["name"]
        if (folder / SAMPLED).is_file():
            row["sampled"] = json.loads((folder / SAMPLED).read_text(encoding="utf-8"))
        spent = ledger["stages"][stage.name]
        row |= {key: spent[key] for key in ("usd", "device_hours", "wall_seconds", "phases")}
        rows.append({**row, "name": stage.name, "what": stage.what, "finished": (folder / REPORT).is_file()})
    report = {"recipe": str(recipe.path), "seed": recipe.seed, "stages": rows, "ledger": ledger}
    write_whole(run_dir / REPORT, json.dumps(report, indent=1) + "\n")
    return report


def recipe_table(report: dict[str, Any]) -> Table:
    """Return the report of a recipe as a table for a terminal; pass@1 is that of sampled answers."""
    ledger = report["ledger"]
    table = Table(caption=f"{ledger['wall_seconds']:.0f} s of wall-clock; hash chains: {ledger['chain']}")
    table.add_column("stage")
    table.add_column("what")
    for name in ("device-hours", "usd", "pass@1 (held out)"):
        table.add_column(name, justify="right")
    for row in report["stages"]:
        solved = f"{row['pass_at_1']:.1%}" if "pass_at_1" in row else "" if row["finished"] else "not finished"
        table.add_row(row["name"], row["what"], figure(row["device_hours"]), figure(row["usd"]), solved)
    between = ledger.get("between", ledger)
    table.add_row("", "between stages", figure(between["device_hours"]), figure(between["usd"]), "")
    table.add_section()
    table.add_row("total", "", figure(ledger["device_hours"]), figure(ledger["usd"]), "")
    return table
