"""The ledger of a run folder, verified and summed: what ``ds-lightning ledger RUN_DIR`` prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from ds_lightning.cost.heartbeat import read_heartbeat
from ds_lightning.cost.records import PHASES, Terms, book_into, from_seconds, read_ledger

LEDGER_NAME = "ledger.jsonl"
"""Name of the ledger in a run folder."""


def ledger_report(run_dir: str | Path) -> dict[str, Any]:
    """Verify a run's ledger and return its sums as JSON-ready values; nothing is changed.

    Seconds that a running or a killed attempt has in its heartbeat only are counted, and given as
    ``unwritten_seconds``. The folder of a recipe holds the folders of its stages: their sums are given under
    ``stages``, in the order in which they began, those of the time between stages under ``between``, and all other
    sums are over all of them.

    Args:
        run_dir: The folder of a run or of a recipe.

    Raises:
        ValueError: If there is no ledger in the folder, or one was tampered with.
    """
    path = Path(run_dir) / LEDGER_NAME
    if not path.is_file():
        raise ValueError(f"{run_dir} has no {LEDGER_NAME}, expected the folder of a run")
    own = _sums(path)
    stages = sorted(path.parent.glob(f"*/{LEDGER_NAME}"), key=_began)
    if not stages:
        return own
    reports = {stage.parent.name: _sums(stage) for stage in stages}
    return {"ledger": own["ledger"], **_added([own, *reports.values()]), "stages": reports, "between": own}


def _began(path: Path) -> str:
    """Return when the first record of a ledger was written; whether it is sound is seen elsewhere."""
    with path.open(encoding="utf-8") as lines:
        first = next(lines, "")
    return first.partition('"time":')[2][:30].strip(' "')


def _added(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sums of several ledgers."""
    keys = ("records", "torn_bytes", "unwritten_seconds", "attempts", "wall_seconds", "device_hours", "usd")
    total: dict[str, Any] = {"chain": "ok", **{key: sum(report[key] for report in reports) for key in keys}}
    hours = total["device_hours"]
    total["phases"] = {}
    for phase in PHASES:
        rows = [report["phases"][phase] for report in reports if phase in report["phases"]]
        if rows:
            row = {key: sum(row[key] for row in rows) for key in ("seconds", "device_hours", "usd")}
            total["phases"][phase] = {**row, "share": row["device_hours"] / hours if hours else 0.0}
    total["energy"] = {key: sum(report["energy"][key] for report in reports) for key in reports[0]["energy"]}
    total["terms"] = [term for report in reports for term in report["terms"]]
    return total


def _sums(path: Path) -> dict[str, Any]:
    """Verify one ledger and return its sums."""
    ledger = read_ledger(path)
    unwritten = 0
    beat = read_heartbeat(path.with_suffix(".heartbeat"))
    if beat is not None and beat["after"] == ledger.last_hash:
        times = from_seconds(beat["seconds"])
        unwritten = sum(times.values())
        book_into(ledger.book, Terms(**beat["terms"]), times)
        ledger.add_energy(beat, times)
        attempt = beat["attempt"]
        ledger.attempt_nanoseconds[attempt] = ledger.attempt_nanoseconds.get(attempt, 0) + unwritten
    totals = ledger.totals
    return {
        "ledger": str(path),
        "chain": "ok",
        "records": ledger.records,
        "torn_bytes": ledger.torn_bytes,
        "unwritten_seconds": unwritten / 1e9,
        "attempts": len(ledger.attempt_nanoseconds),
        "attempt_seconds": {str(attempt): time / 1e9 for attempt, time in ledger.attempt_nanoseconds.items()},
        "wall_seconds": totals.wall_seconds,
        "device_hours": totals.device_hours,
        "usd": totals.usd,
        "energy": {"kwh": ledger.joules / 3.6e6, "metered_device_hours": ledger.metered_nanoseconds / 3.6e12},
        "phases": {
            phase: {
                "seconds": totals.seconds[phase],
                "device_hours": hours,
                "share": hours / totals.device_hours if totals.device_hours else 0.0,
                "usd": totals.usd_by_phase[phase],
            }
            for phase, hours in totals.device_hours_by_phase.items()
        },
        "terms": [{**terms.to_dict(), "seconds": sum(times.values()) / 1e9} for terms, times in ledger.book.items()],
    }


def ledger_table(report: dict[str, Any]) -> Table:
    """Return the sums of :func:`ledger_report` as a table to print."""
    attempts, records = report["attempts"], report["records"]
    caption = (
        f"{attempts} attempt{'s' if attempts != 1 else ''}, {report['wall_seconds']:.1f} s of wall-clock; "
        f"hash chain of {records} records: {report['chain']}"
    )
    if report["torn_bytes"]:
        caption += f"; an unfinished last line of {report['torn_bytes']} bytes is not counted"
    if report["unwritten_seconds"]:
        caption += f"; {report['unwritten_seconds']:.1f} s are in the heartbeat only"
    if report.get("energy", {}).get("metered_device_hours"):  # a report.json of before has none
        caption += f"; {energy_text(report)}"
    table = Table(title=report["ledger"], caption=caption)
    table.add_column("phase")
    for name in ("device-hours", "share", "usd"):
        table.add_column(name, justify="right")
    if "stages" in report:
        table.columns[0].header = "stage, phase"
        for stage, sums in {**report["stages"], "between stages": report["between"]}.items():
            share = sums["device_hours"] / report["device_hours"] if report["device_hours"] else 0.0
            table.add_row(stage, figure(sums["device_hours"]), f"{share:.1%}", figure(sums["usd"]))
        table.add_section()
    for phase, row in report["phases"].items():
        table.add_row(phase, figure(row["device_hours"]), f"{row['share']:.1%}", figure(row["usd"]))
    table.add_section()
    table.add_row("total", figure(report["device_hours"]), "100.0%", figure(report["usd"]))
    return table


def energy_text(report: dict[str, Any]) -> str:
    """Return the energy of :func:`ledger_report` in a few words; where not all was measured, of how much it is."""
    energy, hours = report["energy"], report["device_hours"]
    metered = energy["metered_device_hours"]
    of = "" if metered >= 0.995 * hours else f" in {figure(metered)} of {figure(hours)} device-hours"
    return f"{figure(energy['kwh'])} kWh by the counters of the GPUs{of}"


def figure(value: float) -> str:
    """Return a sum as text: four figures of a laptop's cents, all dollars of a cluster's bill."""
    return f"{value:,.2f}" if abs(value) >= 1000 else f"{value:.4g}"
