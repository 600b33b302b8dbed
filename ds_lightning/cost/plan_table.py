"""A plan as tables for a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text


def plan_table(plan: dict[str, Any]) -> Group:
    """Return what :func:`ds_lightning.cost.plan` says as tables; a plan of a budget ends with its config."""
    parts: list[Any] = [_what(plan), _memory(plan), _money(plan)]
    parts.append(Text(f"It rests on this: {plan['assumption']}."))
    parts += [Text(f"Note: {note}.") for note in plan["notes"]]
    if "yaml" in plan:
        parts += [Text(f"From {what}: {source}.") for what, source in plan["law"].items()]
        parts += [Text("The config to run:\n"), Text(plan["yaml"], no_wrap=True)]
    return Group(*parts)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=bool(columns), min_width=60)
    table.add_column(columns[0] if columns else "")
    for column in columns[1:] or ("",):
        table.add_column(column, justify="right")
    return table


def _what(plan: dict[str, Any]) -> Table:
    table = _table(f"{', '.join(plan['config'])} on {plan['num_devices']:,} {plan['device']}")
    efficiency, price = plan["efficiency"], plan["price"]
    rows = {
        "parameters": f"{plan['parameters']:,}",
        "active parameters": f"{plan['active_parameters']:,}",
        "FLOPs a token": f"{plan['flops_per_token']:,}",
        "tokens": f"{plan['tokens']:,}",
        "steps": f"{plan['steps']:,}",
        "efficiency": f"{efficiency['value']:.1%} ({efficiency['low']:.1%} to {efficiency['high']:.1%})",
        "tokens a second": f"{plan['tokens_per_second']:,.0f}",
        "dollars a device-hour": f"{price['usd_per_device_hour']:g} ({price['market']}, {price['date']})",
        "layout": _layout(plan),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _layout(plan: dict[str, Any]) -> str:
    parts = [f"ZeRO-{plan['zero_stage']}"]
    parts += ["offload"] * plan["offload"] + ["recompute"] * plan["recompute"]
    if plan["expert_parallel"] > 1:
        parts.append(f"experts over {plan['expert_parallel']}")
    if plan["pipeline_parallel"] > 1:
        parts.append(f"layers over {plan['pipeline_parallel']}")
    return ", ".join(parts)


def _memory(plan: dict[str, Any]) -> Table:
    memory = plan["memory_gb"]
    table = _table("memory of a device", "part", "GB")
    for name in ("weights", "gradients", "optimizer", "activations", "workspace"):
        table.add_row(name, f"{memory[name]:,.3g}")
    if memory["base"]:
        table.add_row("program and libraries", f"{memory['base']:,.3g}")
    table.add_section()
    table.add_row(f"total of {memory['available']:g}", f"{memory['total']:,.3g}")
    if memory["host"]:
        table.add_row("on the host", f"{memory['host']:,.3g}")
    return table


def _money(plan: dict[str, Any]) -> Table:
    table = _table("time and money", "phase", "hours", "device-hours", "dollars")
    for phase, row in plan["phases"].items():
        table.add_row(phase, figure(row["seconds"] / 3600), figure(row["device_hours"]), figure(row["usd"]))
    table.add_section()
    table.add_row("total", figure(plan["wall_seconds"] / 3600), figure(plan["device_hours"]), figure(plan["usd"]))
    for bound in ("low", "high"):
        table.add_row(bound, "", figure(plan[f"device_hours_{bound}"]), figure(plan[f"usd_{bound}"]))
    return table


def figure(value: float) -> str:
    """Four figures of a laptop's cents, all dollars of a cluster's bill."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
