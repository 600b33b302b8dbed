"""A published claim, recomputed line by line from its own parts: what ``ds-lightning audit`` prints."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

from ds_lightning.cost.claims import Claim, Line, Operation, Part, read_claim
from ds_lightning.cost.figures import Figure, plain, read_figure, show
from ds_lightning.cost.implied import implied_figures, measured_figures

STATUSES = ("CONSISTENT", "ROUNDED", "UNRECONCILED", "EXCLUDED", "STATED")
"""Equal; equal within the rounding of the printed figures; contradicted by its own parts; left out by the claim; an
input that nothing else in the claim determines."""

LIMIT = Fraction(10) ** 60

_SIGNS = {"sum": " + ", "difference": " - ", "product": " x ", "quotient": " / "}


def audit(name_or_file: str | Path) -> dict[str, Any]:
    """Recompute a published claim and return the result as JSON-ready values.

    A line that follows from others is recomputed exactly, and passes its exact value on to the lines that follow from
    it; where it is UNRECONCILED, they go on from what was published. ROUNDED means that some numbers within the
    rounding of the printed figures make the line true, so that UNRECONCILED is never an effect of rounding.

    Args:
        name_or_file: Name of a claim that ships with the package (``deepseek-r1``), or a YAML file.

    Returns:
        ``lines`` (of which ``recomputed`` is a number), ``totals``, ``implied`` with ``implied_range``, ``measured``,
        and the ``verdict``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such claim, the file is no claim, or a line divides by zero.
    """
    claim = read_claim(name_or_file)
    sheet = Sheet(claim)
    lines = [_line_report(sheet, line) for line in (*claim.lines, *claim.excluded)]
    implied = implied_figures(claim, sheet.figure)
    measured = measured_figures(claim, sheet.figure, implied)
    totals = _totals(sheet, lines)
    return {
        "claim": claim.path.stem,
        "file": str(claim.path),
        "statement": claim.statement,
        "currency": "USD",
        "lines": lines,
        "counts": {status: Counter(line["status"] for line in lines)[status] for status in STATUSES},
        "totals": totals,
        "implied": {key: plain(figure.value) for key, figure in implied.items()},
        "implied_range": {key: [plain(figure.low), plain(figure.high)] for key, figure in implied.items()},
        "measured": measured,
        "sources": claim.sources,
        "verdict": verdict(lines, totals, measured),
    }


class Sheet:
    """The figures of a claim, each computed once."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self._lines = {line.name: line for line in claim.lines}
        self._figures: dict[str, Figure] = {}

    def figure(self, part: Part) -> Figure:
        """Return what a part amounts to.

        Raises:
            ValueError: If it divides by zero, or by a figure that may be zero within its rounding.
        """
        if isinstance(part, Operation):
            first, *rest = (self.figure(inner) for inner in part.parts)
            for inner, figure in zip(part.parts[1:], rest, strict=True):
                first = self._apply(part, first, figure, inner)
            return self._sane(first)
        if not isinstance(part, str):
            return self._sane(Figure.exact(part))
        if part not in self._figures:
            line = self._lines[part]
            recomputed = self.recomputed(line)
            published = self.published(line)
            agrees = recomputed is not None and recomputed.meets(published)
            self._figures[part] = recomputed if agrees and recomputed is not None else published
        return self._figures[part]

    def published(self, line: Line) -> Figure:
        """Return a line's figure as it was published."""
        assert line.published is not None
        if isinstance(line.published, Operation):
            return self.figure(line.published)
        return self._sane(read_figure(line.published, line.rounded_to))

    def recomputed(self, line: Line) -> Figure | None:
        """Return what a line should be; none if it follows from nothing."""
        return None if line.follows_from is None else self.figure(line.follows_from)

    def _sane(self, figure: Figure) -> Figure:
        """Refuse what would leave the range of floats further on."""
        if figure.value and not LIMIT**-1 < abs(figure.value) < LIMIT:
            size = "above" if abs(figure.value) > 1 else "below"
            bound = "1e60" if abs(figure.value) > 1 else "1e-60"
            raise ValueError(f"{self.claim.path}: a figure is {size} {bound}, expected one that a training can have")
        return figure

    def _apply(self, operation: Operation, left: Figure, right: Figure, part: Part) -> Figure:
        if operation.kind == "sum":
            return left + right
        if operation.kind == "difference":
            return left - right
        if operation.kind == "product":
            return left * right
        try:
            return left / right
        except ZeroDivisionError:
            what = f"{part!r}" if isinstance(part, str) else "a part"
            found = "0" if right.value == 0 else f"{show(right.value)}, which may be 0 within its rounding"
            raise ValueError(
                f"{self.claim.path}: {self.arithmetic(operation)} divides by {what}, which is {found}; "
                "expected a divisor other than 0"
            ) from None

    def arithmetic(self, part: Part) -> str:
        """Write a part out with its figures."""
        if not isinstance(part, Operation):
            return show(self.figure(part).value)
        words = []
        for place, inner in enumerate(part.parts):
            text = self.arithmetic(inner)
            binds = isinstance(inner, Operation) and inner.kind in ("product", "quotient")
            loose = isinstance(inner, Operation) and not (
                (binds and (place == 0 or part.kind != "quotient"))
                or (place == 0 and part.kind in ("sum", "difference"))
                or (isinstance(inner, Operation) and inner.kind == part.kind == "sum")
            )
            words.append(f"({text})" if loose else text)
        return _SIGNS[part.kind].join(words)


def _line_report(sheet: Sheet, line: Line) -> dict[str, Any]:
    recomputed = sheet.recomputed(line)
    published = None if line.published is None else sheet.published(line)
    arithmetic = ""
    if line.follows_from is not None and recomputed is not None:
        arithmetic = f"{sheet.arithmetic(line.follows_from)} = {show(recomputed.value)}"
    printed: str | None = None
    if isinstance(line.published, Operation):
        assert published is not None
        printed = f"{show(published.value)} ({sheet.arithmetic(line.published)})"
    elif line.published is not None:
        printed = line.published
    status = _status(published, recomputed)
    if status == "UNRECONCILED":
        arithmetic += f", but published: {printed}"
    title = sheet.claim.sources[line.source]["title"] if line.source else ""
    return {
        "name": line.name,
        "published": printed,
        "published_value": None if published is None else published.number,
        "recomputed": None if recomputed is None else recomputed.number,
        "recomputed_range": None if recomputed is None else [plain(recomputed.low), plain(recomputed.high)],
        "unit": line.unit,
        "status": status,
        "arithmetic": arithmetic,
        "source_key": line.source or None,
        "at": line.at,
        "source": ", ".join(part for part in (title, line.at) if part),
        "read": sheet.claim.sources[line.source]["read"] if line.source else None,
        "date": line.date or None,
        "note": line.note,
    }


def _status(published: Figure | None, recomputed: Figure | None) -> str:
    if published is None:
        return "EXCLUDED"
    if recomputed is None:
        return "STATED"
    if recomputed.value == published.value:
        return "CONSISTENT"
    return "ROUNDED" if recomputed.meets(published) else "UNRECONCILED"


def _totals(sheet: Sheet, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the claim's own totals, exact and as published, and what the costs that it leaves out add."""
    by_name = {line["name"]: line for line in lines}
    totals: dict[str, Any] = {}
    for key, part in sheet.claim.totals.items():
        totals[key] = sheet.figure(part).number
        if isinstance(part, str):
            totals[f"published_{key}"] = by_name[part]["published_value"]
    estimates = [
        line["recomputed"]
        for line in lines
        if line["status"] == "EXCLUDED" and line["unit"] == "USD" and line["recomputed"] is not None
    ]
    if estimates:
        totals["excluded_usd"] = plain(sum(map(_exact, estimates), Fraction(0)))
        if "usd" in totals:
            totals["usd_with_excluded"] = plain(_exact(totals["usd"]) + _exact(totals["excluded_usd"]))
    return totals


def _exact(number: float) -> Fraction:
    return Fraction(str(number))


def verdict(lines: list[dict[str, Any]], totals: dict[str, Any], measured: list[dict[str, Any]]) -> str:
    """Return one sentence that follows from the figures: agreement, speed, and what is left out."""
    names: dict[str, list[str]] = {status: [] for status in STATUSES}
    for line in lines:
        names[line["status"]].append(line["name"])
    same, rounded, wrong = (len(names[status]) for status in STATUSES[:3])
    checked = same + rounded + wrong
    said = [f"{same + rounded} of {checked} recomputed lines agree ({same} exactly, {rounded} after rounding)"]
    if not checked:
        said = ["no line of the claim follows from others, so none can be recomputed"]
    if wrong:
        contradict = "contradicts its" if wrong == 1 else "contradict their"
        said[0] += f" and {wrong} {contradict} own parts: {', '.join(names['UNRECONCILED'])}"
    if unread := sum(line["read"] == "unverified" for line in lines):
        said.append(f"{unread} figure{'s were' if unread > 1 else ' was'} not checked at the source")
    independent = [entry for entry in measured if entry["independent"]]
    said += _speed_verdict([entry for entry in independent if entry["same_peak"]], len(independent))
    if left_out := names["EXCLUDED"]:
        said.append(f"left out {'is 1 cost' if len(left_out) == 1 else f'are {len(left_out)} costs'}")
        if "excluded_usd" in totals:
            said[-1] += f", of which those that can be estimated add {show(totals['excluded_usd'])} dollars"
            if totals.get("usd"):
                ratio = totals["excluded_usd"] / totals["usd"]
                said[-1] += f", {ratio:.{1 if ratio >= 1 else 2}f} times the claimed {show(totals['usd'])}"
        else:
            said[-1] += ", none of which has a published basis for an estimate"
    sentence = "; ".join(said) + "."
    return sentence[0].upper() + sentence[1:]


def _speed_verdict(comparable: list[dict[str, Any]], measurements: int) -> list[str]:
    if not comparable:
        return ["no independent measurement on devices of the same peak is at hand"] if measurements else []
    ratios = [entry["claim_over_measured"] for entry in comparable]
    low, high, count = min(ratios), max(ratios), len(ratios)
    if count == 1:
        said = f"the claimed speed is {low:.2f} times that of the only independent measurement"
        return [f"{said} on devices of the same peak, which {'does not reach' if low > 1 else 'reaches'} it"]
    reached = sum(ratio <= 1 for ratio in ratios)
    said = f"the claimed speed is {low:.2f} to {high:.2f} times that of {count} independent measurements"
    which = {0: "none", count: "all"}.get(reached, str(reached))
    return [f"{said} on devices of the same peak, of which {which} reach{'es' if reached < 2 else ''} it"]
