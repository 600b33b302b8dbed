"""Figures as they were printed: a value, and the interval that its digits leave open; exact arithmetic on both."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_FIGURE = re.compile(
    r"(?P<about>about |approximately |around |~ ?)?\$?(?P<digits>\d{1,3}(?:,\d{3})+|\d+)(?:\.(?P<decimals>\d+))?"
    r"(?:e(?P<power>[+-]?\d{1,2}))?(?:(?P<letter>[KMBT])\b| ?(?P<word>thousand|million|billion|trillion)\b)?"
    r"(?: ?(?!(?:[KMBT]|thousand|million|billion|trillion)\b)(?P<what>[A-Z%/][A-Z%/ -]*))?",
    re.IGNORECASE,
)
_SCALES = {"": 0, "k": 3, "m": 6, "b": 9, "t": 12, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_OTHER_MONEY = re.compile(r"[\u20ac\u00a3\u00a5\u20b9]|\b(?:EUR|GBP|CNY|RMB|JPY|CHF|CAD|AUD|INR|KRW)\b")


@dataclass(frozen=True)
class Figure:
    """A number and the closed interval that it may stand for; ``low`` = ``high`` where it is exact."""

    value: Fraction
    low: Fraction
    high: Fraction

    @classmethod
    def exact(cls, number: float | Fraction) -> Figure:
        """Return a number without any rounding, a float as the decimal that it prints as."""
        value = number if isinstance(number, Fraction) else Fraction(str(number))
        return cls(value, value, value)

    def __add__(self, other: Figure) -> Figure:
        return Figure(self.value + other.value, self.low + other.low, self.high + other.high)

    def __sub__(self, other: Figure) -> Figure:
        return Figure(self.value - other.value, self.low - other.high, self.high - other.low)

    def __mul__(self, other: Figure) -> Figure:
        ends = [one * two for one in (self.low, self.high) for two in (other.low, other.high)]
        return Figure(self.value * other.value, min(ends), max(ends))

    def __truediv__(self, other: Figure) -> Figure:
        if other.low <= 0 <= other.high:
            raise ZeroDivisionError
        return self * Figure(1 / other.value, 1 / other.high, 1 / other.low)

    def meets(self, other: Figure) -> bool:
        """Tell whether some number is in both intervals: whether rounding can explain the difference."""
        return self.low <= other.high and other.low <= self.high

    @property
    def number(self) -> int | float:
        """The value as JSON has it: an integer where it is one."""
        return plain(self.value)


def plain(value: Fraction) -> int | float:
    """Return an integer where the fraction is one, otherwise the nearest float."""
    return value.numerator if value.denominator == 1 else float(value)


def is_other_money(text: str) -> bool:
    """Tell whether a text names a currency other than the US dollar."""
    return _OTHER_MONEY.search(text) is not None


def read_figure(text: str, rounded_to: float | None = None) -> Figure:
    """Read a figure as printed: ``2,664K``, ``$5.576M``, ``about 4 days``, ``3.8e25``, ``41%``.

    The digits define the interval: half a unit of the last one to both sides. In a figure that calls itself
    approximate (``about``, ``~``) trailing zeros are no digits: ``about 800K`` is 750K to 850K.

    Args:
        text: The figure, with whatever unit follows it.
        rounded_to: Step that the figure is rounded to, where its digits do not show it; 0: it is exact, as a count
            or an assumption is.

    Raises:
        ValueError: If the text is no figure, or one in another currency than US dollars.
    """
    if is_other_money(text):
        raise ValueError(f"{text!r} is in another currency, expected US dollars: convert it at a dated rate")
    match = _FIGURE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no figure, expected one as printed, such as '2,664K', '$5.576M', 'about 4 days'")
    decimals = match["decimals"] or ""
    digits = match["digits"].replace(",", "") + decimals
    scale = _SCALES[(match["letter"] or match["word"] or "").lower()]
    exponent = int(match["power"] or 0) + scale - len(decimals)
    value = int(digits) * Fraction(10) ** exponent
    if rounded_to is not None:
        half = Fraction(str(rounded_to)) / 2
    else:
        insignificant = len(digits) - len(digits.rstrip("0")) if match["about"] and not decimals else 0
        half = Fraction(10) ** (exponent + insignificant) / 2
    return Figure(value, value - half, value + half)


def show(value: Fraction | float) -> str:
    """Return a figure for people: whole up to a trillion, four digits of what is small, a power of ten beyond."""
    number = float(value)
    if abs(number) >= 1e12:
        mantissa, _, exponent = f"{number:.4g}".partition("e+")
        return f"{mantissa}e{int(exponent)}"
    if number.is_integer() or abs(number) >= 1e6:
        return f"{number:,.0f}"
    return f"{number:,.1f}" if abs(number) >= 1000 else f"{number:.4g}"
