"""The ledger of a run folder, verified and summed: what ``ds-lightning ledger RUN_DIR`` prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from ds_lightning.cost.heartbeat import read_heartbeat
from ds_lightning.cost.records import Terms, book_into, from_seconds, read_ledger

LEDGER_NAME = "ledger.jsonl"
"""Name of the ledger in a run folder."""


def ledger_report(run_dir: str | Path) -> dict[str, Any]:
    """Verify a run's ledger and return its sums as JSON-ready values; nothing is changed.

    Seconds that a running or a killed attempt has in its heartbeat only are counted, and given as
    ``unwritten_seconds``.

    Args:
        run_dir: The run's folder.

    Raises:
        ValueError: If there is no ledger in the folder, or it was tampered with.
    """
    path = Path(run_dir) / LEDGER_NAME
    if not path.is_file():
        raise ValueError(f"{run_dir} has no {LEDGER_NAME}, expected the folder of a run")
    ledger = read_ledger(path)
    unwritten = 0
    beat = read_heartbeat(path.with_suffix(".heartbeat"))
    if beat is not None and beat["after"] == ledger.last_hash:
        times = from_seconds(beat["seconds"])
        unwritten = sum(times.values())
        book_into(ledger.book, Terms(**beat["terms"]), times)
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
    table = Table(title=report["ledger"], caption=caption)
    table.add_column("phase")
    for name in ("device-hours", "share", "usd"):
        table.add_column(name, justify="right")
    for phase, row in report["phases"].items():
        table.add_row(phase, _figure(row["device_hours"]), f"{row['share']:.1%}", _figure(row["usd"]))
    table.add_section()
    table.add_row("total", _figure(report["device_hours"]), "100.0%", _figure(report["usd"]))
    return table


def _figure(value: float) -> str:
    """Four figures of a laptop's cents, all dollars of a cluster's bill."""
    return f"{value:,.2f}" if abs(value) >= 1000 else f"{value:.4g}"
