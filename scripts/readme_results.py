#!/usr/bin/env python3
"""Write the README's results table from ``docs/results/quickstart.json``.

That file has ``date``, ``machine``, ``command``, ``wall_seconds`` (of the whole command) and ``stage``: the first of
``stages`` in the ``report.json`` of the run.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "results" / "quickstart.json"
README = ROOT / "README.md"
BEGIN = "<!-- results: written by scripts/readme_results.py -->"
END = "<!-- end of results -->"


def results_table(results: dict[str, Any] | None) -> str:
    """Return the results as Markdown; without any, the line that says so."""
    if results is None:
        return "Not measured yet: `docs/results/quickstart.json` is missing."
    stage = results["stage"]
    rows = [
        ("parameters, active per token", f"{stage['parameters']:,}, {stage['active_parameters']:,}"),
        ("tokens trained on", f"{stage['tokens']:,}"),
        ("tokens per second", f"{stage['tokens_per_second']:,.0f}"),
        *((f"held-out bits per byte, {name}", f"{bits:.3f}") for name, bits in stage["bits_per_byte"].items()),
        ("device-hours", f"{stage['device_hours']:.3f}"),
        ("dollars", f"{stage['usd']:.6f}"),
        *((f"dollars, {name}", f"{phase['usd']:.6f}") for name, phase in stage["phases"].items() if phase["usd"]),
        ("seconds from start to end", f"{results['wall_seconds']:,.0f}"),
    ]
    head = f"`{results['command']}` on {results['machine']}, {results['date']}:"
    lines = [head, "", "| what | measured |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)


def with_results(readme: str, table: str) -> str:
    """Return the README with the table between its two markers."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def read_results() -> dict[str, Any] | None:
    """Return the measured figures, or none where nothing was measured."""
    return json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.is_file() else None


def main() -> int:
    """Rewrite the README."""
    README.write_text(with_results(README.read_text(encoding="utf-8"), results_table(read_results())), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
