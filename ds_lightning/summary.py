"""What a run brought and what it cost: the figures of ``report.json``, and the table that ``fit`` prints."""

import json
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ds_lightning.cost.ledger_report import ledger_report, ledger_table
from ds_lightning.whole_file import write_whole

REPORT = "report.json"


def write_report(run_dir: Path, figures: dict[str, Any]) -> dict[str, Any]:
    """Write ``report.json`` of a run that is one stage, with its cost so far from the ledger.

    Args:
        run_dir: The run's folder.
        figures: What was measured: name, tokens, parameters, metrics.

    Returns:
        The report.
    """
    ledger = ledger_report(run_dir)
    phases = ledger["phases"]
    working = sum(phases[name]["seconds"] for name in ("train", "data") if name in phases)
    stage = {
        **figures,
        "tokens_per_second": figures["tokens"] / working if working else 0.0,
        "usd": ledger["usd"],
        "device_hours": ledger["device_hours"],
        "phases": phases,
    }
    report = {"stages": [stage], "ledger": ledger}
    write_whole(run_dir / REPORT, json.dumps(report, indent=1) + "\n")
    return report


def read_report(run_dir: Path) -> dict[str, Any]:
    """Return a run's ``report.json``.

    Raises:
        ValueError: If the file is damaged.
    """
    path = run_dir / REPORT
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): delete it, the next run writes it anew") from None
    return report


def summary_table(report: dict[str, Any]) -> Group:
    """Return the figures of a report's stage as tables for a terminal."""
    stage = report["stages"][0]
    quality = Table(title="held-out text", title_justify="left")
    quality.add_column("what")
    quality.add_column("bits per byte", justify="right")
    for name, bits in stage["bits_per_byte"].items():
        quality.add_row(name, f"{bits:.3f}")
    line = (
        f"{stage['tokens']:,} tokens, {stage['tokens_per_second']:,.0f} a second; {stage['parameters']:,} parameters, "
        f"{stage['active_parameters']:,} active"
    )
    parts: list[Any] = [Text(line), *([quality] if stage["bits_per_byte"] else []), ledger_table(report["ledger"])]
    for sample in stage["samples"]:
        parts += [Text("sample", style="bold"), Text(sample)]
    return Group(*parts)
