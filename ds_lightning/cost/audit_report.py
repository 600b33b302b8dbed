"""The result of an audit as tables to print, readable at 80 columns."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ds_lightning.cost.figures import show

_IMPLIED = {
    "tokens_per_second_per_device": "tokens a second and device",
    "device_hours_per_trillion_tokens": "device-hours a trillion tokens",
    "usd_per_device_hour": "dollars a device-hour",
    "usd_per_million_tokens": "dollars a million tokens",
    "flops_per_token": "FLOPs a token",
    "tflops_per_device": "TFLOP/s a device",
    "mfu_bf16": "share of the BF16 peak",
    "mfu_bf16_full_attention": "  the same, the whole attention square counted",
    "mfu_bf16_without_mtp": "  the same, without multi-token prediction",
    "mfu_fp8": "share of the FP8 peak",
    "days": "days on the claimed devices",
    "device_seconds_per_sample": "device-seconds a sample",
    "usd_per_sample": "dollars a sample",
}
_COLOURS = {"CONSISTENT": "green", "ROUNDED": "green", "UNRECONCILED": "red", "EXCLUDED": "yellow", "STATED": ""}


def audit_tables(report: dict[str, Any]) -> Group:
    """Return the result of :func:`ds_lightning.cost.audit` as tables, with the verdict below them."""
    parts: list[Table | Text] = [Text(report["statement"], style="bold"), Text(""), _lines_table(report)]
    if report["implied"]:
        parts.append(_implied_table(report))
    if report["measured"]:
        parts.append(_measured_table(report))
    parts += [_sources_table(report), Text(""), Text(f"Verdict: {report['verdict']}", style="bold")]
    return Group(*parts)


def _table(title: str, *columns: str) -> Table:
    """Return a table of which the first column takes the room that the others leave."""
    table = Table(title=title, title_justify="left", expand=True)
    table.add_column(columns[0], ratio=1, overflow="fold")
    for name in columns[1:]:
        table.add_column(name, justify="right", max_width=15, overflow="fold")
    return table


def _lines_table(report: dict[str, Any]) -> Table:
    table = _table("The lines", "line, and what it follows from", "published", "recomputed", "status")
    for line in report["lines"]:
        name = Text(line["name"] if line["unit"] in line["name"] else f"{line['name']} ({line['unit']})")
        if line["source_key"]:
            name.append(f" [{line['source_key']}: {line['at']}]", style="dim")
        for below in (line["arithmetic"], line["note"]):
            if below:
                name.append(f"\n  {below}", style="dim")
        recomputed = "" if line["recomputed"] is None else show(line["recomputed"])
        status = Text(line["status"], style=_COLOURS[line["status"]])
        table.add_row(name, Text((line["published"] or "").partition(" (")[0]), recomputed, status)
    return table


def _implied_table(report: dict[str, Any]) -> Table:
    table = _table("What the claim implies", "figure", "implied", "within rounding")
    table.columns[2].max_width = None
    for key, value in report["implied"].items():
        low, high = report["implied_range"][key]
        share = key.startswith("mfu")
        low, high = _figure(low, share), _figure(high, share)
        span = "" if low == high else f"{low} to {high}"
        table.add_row(_IMPLIED[key], _figure(value, share), span)
    return table


def _measured_table(report: dict[str, Any]) -> Table:
    table = _table("Beside what others measured", "system", "measured", "claim / it", "of BF16", "$/h at parity")
    for entry in report["measured"]:
        (kind,) = (key for key in _IMPLIED if key in entry and not key.startswith(("mfu", "device_hours")))
        unit = {"tokens_per_second_per_device": "tokens/s", "tflops_per_device": "TFLOP/s"}.get(kind, "s a sample")
        system = Text(entry["system"])
        if entry["note"]:
            system.append(f"\n  {entry['note']}", style="dim")
        table.add_row(
            system,
            f"{show(entry[kind])} {unit}",
            f"{entry['claim_over_measured']:.2f}x",
            f"{entry['mfu_bf16']:.1%}" if "mfu_bf16" in entry else "",
            f"{entry['usd_per_device_hour_at_parity']:.2f}",
        )
    return table


def _sources_table(report: dict[str, Any]) -> Table:
    table = _table("Where the figures were read", "source", "read")
    for key, source in report["sources"].items():
        table.add_row(Text(f"{key}: {source['title']}"), source["read"])
    return table


def _figure(value: float, share: bool) -> str:
    return f"{value:.1%}" if share else show(value)
