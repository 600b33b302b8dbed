"""Figures and foreign text as HTML that is safe to show."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def safe(text: object) -> str:
    """Return any text, above all what a model wrote, as HTML that shows it and does nothing else.

    Markup is escaped. Control characters, marks that turn the direction of writing and lone surrogates, which no
    browser shows as what they are, become U+FFFD.
    """
    return html.escape(_CONTROL.sub("\ufffd", str(text).replace("\r\n", "\n")))


def usd(value: float) -> str:
    """Return dollars: three figures of a laptop's cents, cents of a dinner, whole dollars of a cluster's bill."""
    if abs(value) >= 1000:
        return f"${value:,.0f}"
    return f"${value:,.2f}" if abs(value) >= 10 else f"${significant(value, 3)}"


def column(values: Iterable[float], sign: str = "") -> Callable[[float], str]:
    """Return a format with the same decimals for all amounts of a column: three figures of the largest of them."""
    most = max((abs(value) for value in values), default=0.0)
    decimals = max(0, 2 - math.floor(math.log10(most))) if most else 0
    if most >= 1000:
        decimals = 0
    elif sign and most >= 1:
        decimals = 2

    def show(value: float) -> str:
        text = f"{abs(value):,.{decimals}f}"
        if value and not float(text.replace(",", "")):
            return f"<{sign}{10**-decimals:,.{decimals}f}"
        return f"{'-' if value < 0 else ''}{sign}{text}"

    return show


def hours(value: float) -> str:
    """Return device-hours with three figures, whole ones above a thousand."""
    return f"{value:,.0f}" if abs(value) >= 1000 else significant(value, 3)


def clock(seconds: float) -> str:
    """Return a time for people: ``48 s``, ``7 min 12 s``, ``3 h 05 min``."""
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02} min"


def percent(share: float) -> str:
    """Return a share in percent with one decimal."""
    return f"{share:.1%}"


def ratio(actual: float, planned: float) -> str:
    """Return actual over planned."""
    if planned <= 0:
        return "\u2013"
    value = actual / planned
    return f"{value:,.0f}\u00d7" if value >= 100 else f"{value:.2f}\u00d7"


def significant(value: float, digits: int) -> str:
    """Return a number with so many significant digits and no exponent."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"
