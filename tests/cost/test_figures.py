"""Oracles: intervals by hand, and arithmetic on random members of the intervals."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest

from ds_lightning.cost.figures import Figure, read_figure, show


@pytest.mark.parametrize(
    ("text", "value", "half"),
    [
        ("147K", 147_000, 500),
        ("2,664K", 2_664_000, 500),
        ("2664K", 2_664_000, 500),
        ("$5.576M", 5_576_000, 500),
        ("$0.01M", 10_000, 5_000),
        ("14.8T", 14_800_000_000_000, 50_000_000_000),
        ("5.50 Trillion", 5_500_000_000_000, 5_000_000_000),
        ("~1.05m", 1_050_000, 5_000),
        ("3.8e25", 38 * 10**24, 5 * 10**23),
        ("4.33e+19", 433 * 10**17, 5 * 10**16),
        ("about 4 days", 4, 0.5),
        ("about 198 hours", 198, 0.5),
        ("80 hours", 80, 0.5),
        ("about 80 hours", 80, 5),
        ("about 800K", 800_000, 50_000),
        ("~600x", 600, 50),
        ("~50.0", 50, 0.05),
        ("~$24/hour", 24, 0.5),
        ("41%", 41, 0.5),
        ("10,400", 10_400, 0.5),
        ("3 million", 3_000_000, 500_000),
    ],
)
def test_a_figure_is_read_with_what_its_digits_leave_open(text: str, value: float, half: float) -> None:
    figure = read_figure(text)
    assert figure.value == value
    assert figure.high - figure.value == figure.value - figure.low == Fraction(str(half))


def test_a_step_or_exactness_can_be_stated() -> None:
    assert read_figure("400", 10) == Figure(Fraction(400), Fraction(395), Fraction(405))
    assert read_figure("$2", 0) == Figure.exact(2)


@pytest.mark.parametrize(
    "text", ["", "many", "-3", "1,00", "4 K", "147 KM 3", "1.2.3", "4 days 80", "3e999", "5 B tokens"]
)
def test_what_is_no_figure_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no figure, expected one as printed, such as '2,664K'"):
        read_figure(text)


@pytest.mark.parametrize("text", ["\u20ac2", "2 EUR", "\u00a51.5M", "3 CNY/hour"])
def test_another_currency_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is in another currency, expected US dollars: convert it at a dated rate"):
        read_figure(text)


@pytest.mark.parametrize("kind", ["+", "-", "*", "/"])
def test_the_result_holds_every_result_of_members(kind: str) -> None:
    draw = random.Random(kind)
    operations = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
    apply: Callable[[Any, Any], Any] = operations[kind]
    for _ in range(200):
        ends = [sorted(Fraction(draw.randint(-20, 20), draw.randint(1, 5)) for _ in range(3)) for _ in range(2)]
        if kind == "/" and ends[1][0] <= 0 <= ends[1][2]:
            continue
        one, two = (Figure(middle, low, high) for low, middle, high in ends)
        result = apply(one, two)
        assert result.value == apply(one.value, two.value)
        corners = [apply(a, b) for a in (one.low, one.high) for b in (two.low, two.high)]
        assert (result.low, result.high) == (min(corners), max(corners))


def test_division_by_an_interval_around_zero_is_refused() -> None:
    with pytest.raises(ZeroDivisionError):
        Figure.exact(1) / (read_figure("3") - read_figure("3"))


def test_floats_are_the_decimals_that_they_print_as() -> None:
    assert Figure.exact(0.1) + Figure.exact(0.2) == Figure.exact(Fraction(3, 10))


def test_intervals_meet_at_their_ends() -> None:
    assert read_figure("3").meets(read_figure("4"))
    assert not read_figure("3").meets(read_figure("5"))
    assert not read_figure("5").meets(read_figure("3"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (147_336, "147,336"),
        (1543.2, "1,543.2"),
        (0.0380769, "0.03808"),
        (3.791e25, "3.791e25"),
        (1_976_923.08, "1,976,923"),
        (Fraction(1, 3), "0.3333"),
        (0, "0"),
    ],
)
def test_figures_are_shown_for_people(value: float, text: str) -> None:
    assert show(value) == text
