#!/usr/bin/env python3
"""Write the README's results from ``docs/results/quickstart.json`` and ``docs/results/pretrain.json``.

Both have ``date``, ``machine``, ``command`` and ``wall_seconds`` (of the whole command). The first has ``report``, the
``report.json`` of the recipe; the second ``stage``, the first of ``stages`` in the ``report.json`` of the run.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
README = ROOT / "README.md"
BEGIN = "<!-- results: written by scripts/readme_results.py -->"
END = "<!-- end of results -->"


def results_tables(results: Path) -> str:
    """Return the results in a folder as Markdown; where a file is missing, a line that says so."""
    parts = []
    for name, table in (("quickstart.json", recipe_rows), ("pretrain.json", pretraining_rows)):
        if not (results / name).is_file():
            parts.append(f"Not measured yet: `docs/results/{name}` is missing.")
            continue
        record = json.loads((results / name).read_text(encoding="utf-8"))
        head = f"`{record['command']}` on {record['machine']}, {record['date']}:"
        parts.append("\n".join([head, "", *table(record)]))
    return "\n\n".join(parts)


def recipe_rows(record: dict[str, Any]) -> list[str]:
    """Return the table of a recipe; pass@1 is of 500 held-out problems."""
    report = record["report"]
    ledger = report["ledger"]
    rows = [
        *((stage["name"], stage["what"], stage) for stage in report["stages"]),
        ("", "between stages", ledger["between"]),
        ("total", f"{record['wall_seconds']:,.0f} s with set-up", ledger),
    ]
    return [
        "| stage | what | device-hours | dollars | pass@1, sampled | greedy |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {name} | {what} | {row['device_hours']:.4f} | {row['usd']:.6f} | {solved(row)} |"
            for name, what, row in rows
        ),
    ]


def solved(row: dict[str, Any]) -> str:
    """Return the cells of pass@1 of sampled and of greedy answers; what is no stage has none."""
    shares = [row.get(name) for name in ("pass_at_1", "pass_at_1_greedy")]
    return " | ".join("" if share is None else f"{share:.1%}" for share in shares)


def pretraining_rows(record: dict[str, Any]) -> list[str]:
    """Return the table of a pretraining run."""
    stage = record["stage"]
    rows = [
        ("parameters, active per token", f"{stage['parameters']:,}, {stage['active_parameters']:,}"),
        ("tokens trained on", f"{stage['tokens']:,}"),
        ("tokens per second", f"{stage['tokens_per_second']:,.0f}"),
        *((f"held-out bits per byte, {name}", f"{bits:.3f}") for name, bits in stage["bits_per_byte"].items()),
        ("device-hours", f"{stage['device_hours']:.3f}"),
        ("dollars", f"{stage['usd']:.6f}"),
        *((f"dollars, {name}", f"{phase['usd']:.6f}") for name, phase in stage["phases"].items() if phase["usd"]),
        ("seconds from start to end", f"{record['wall_seconds']:,.0f}"),
    ]
    return ["| what | measured |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows)]


def with_results(readme: str, tables: str) -> str:
    """Return the README with the tables between its two markers."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Rewrite the README."""
    README.write_text(with_results(README.read_text(encoding="utf-8"), results_tables(RESULTS)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
