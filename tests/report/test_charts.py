"""Oracles: the SVG read back as XML, and places computed by hand from the axes that it draws."""

import re
import xml.etree.ElementTree as ET

import pytest

from ds_lightning.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MOST_CELLS,
    RIGHT,
    WIDTH,
    Chart,
    Line,
    heatmap,
    line_chart,
    sparkline,
    stacked_bar,
    ticks,
)
from ds_lightning.report.text import clock, column, percent, ratio, safe, usd


def chart(*parts: list[tuple[float, float]], **settings: object) -> ET.Element:
    values = {"title": "Loss <1>", "description": "from 2 to 1", "x_label": "dollars", "x_format": str, "y_format": str}
    lines = [Line("loss", parts)]
    return ET.fromstring(line_chart(Chart(lines=lines, **{**values, **settings})))  # type: ignore[arg-type]


def by_class(svg: ET.Element, tag: str, name: str) -> list[ET.Element]:
    return [element for element in svg.iter(tag) if name in element.get("class", "").split()]


def numbers(path: str) -> list[tuple[float, float]]:
    found = [float(number) for number in re.findall(r"[\d.]+", path)]
    return list(zip(found[::2], found[1::2], strict=True))


def shades(svg: ET.Element) -> dict[float, int]:
    """Return the cells of a heatmap by opacity."""
    return {float(path.get("fill-opacity", "")): path.get("d", "").count("M") for path in by_class(svg, "path", "heat")}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.5, 1]),
        (0, 100, [0, 50, 100]),
        (0.0, 0.00234, [0, 0.0005, 0.001, 0.0015, 0.002]),
        (1.42, 1.83, [1.5, 1.6, 1.7, 1.8]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round_and_few(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)
    assert len(ticks(low, high)) <= 5


def test_points_stand_where_their_values_say_and_the_dearer_is_to_the_right() -> None:
    svg = chart([(0.5, 2.0), (1.0, 1.0)], from_zero=True)
    [path] = by_class(svg, "path", "line")
    (x0, y0), (x1, y1) = numbers(path.get("d", ""))
    width = WIDTH - RIGHT - LEFT
    assert (x0, x1) == pytest.approx((LEFT + width / 2, LEFT + width), abs=0.1)
    bottom = HEIGHT - BOTTOM
    assert (bottom - y0) == pytest.approx(2 * (bottom - y1), abs=0.2)  # from zero: twice as high
    assert len(by_class(svg, "circle", "dot")) == 2


def test_a_chart_says_what_it_shows() -> None:
    svg = chart([(0.5, 2.0), (1.0, 1.0)], levels=[("gzip", 1.5)], bands=[("base", 0.0, 0.5), ("zero", 0.5, 1.0)])
    assert svg.get("role") == "img"
    assert svg.findtext("title") == "Loss <1>"
    assert svg.findtext("desc") == "from 2 to 1"
    texts = [text.text for text in svg.iter("text")]
    assert {"gzip", "dollars", "1", "2"} <= set(texts)
    assert len(by_class(svg, "rect", "band")) == 1  # every other one is shaded
    [level] = by_class(svg, "line", "level")
    [path] = by_class(svg, "path", "line")
    heights = sorted(y for _, y in numbers(path.get("d", "")))
    assert float(level.get("y1", "")) == pytest.approx(sum(heights) / 2, abs=0.2)


def test_parts_are_not_joined_and_what_is_not_finite_is_left_out() -> None:
    svg = chart([(0.0, 1.0), (0.1, float("nan")), (0.2, 2.0)], [(0.5, 1.0), (1.0, float("inf")), (1.0, 1.5)])
    paths = by_class(svg, "path", "line")
    assert [len(numbers(path.get("d", ""))) for path in paths] == [2, 2]
    assert line_chart(Chart("t", "d", [Line("l", [[(0.0, float("nan"))]])], "x", str, str)) == ""


def test_equal_values_and_single_points_can_be_drawn() -> None:
    assert by_class(chart([(0.0, 0.0)]), "circle", "dot")
    assert by_class(chart([(0.1, 5.0), (0.2, 5.0)]), "path", "line")
    assert sparkline([(0, 1), (0, 1)], "flat").startswith("<svg")
    assert sparkline([(0, 1)], "one point") == ""


def test_the_parts_of_a_bar_are_as_wide_as_their_shares() -> None:
    svg = ET.fromstring(stacked_bar([("a", 3.0, "good"), ("b", 1.0, "rest0")], "money"))
    widths = [float(rect.get("width", "")) for rect in svg.iter("rect")]
    assert widths == pytest.approx([449, 149])
    assert svg.findtext("desc") == "a 75.0%, b 25.0%"
    assert stacked_bar([("a", 0.0, "good")], "nothing") == ""


def test_a_heatmap_has_a_cell_an_expert_the_busier_the_fuller() -> None:
    svg = ET.fromstring(heatmap([[0.0, 1.0, 2.0], [3.0, 1.0, 0.5]], "load"))
    cells = {
        float(path.get("fill-opacity", "")): path.get("d", "").count("M") for path in by_class(svg, "path", "heat")
    }
    assert cells == {0.04: 1, 0.52: 2, 1.0: 2, 0.28: 1}
    assert svg.findtext("desc") == "2 layers of 3 experts; the busiest has 3.00, the idlest 0.00 of a fair share"
    assert heatmap([], "none") == ""


def test_many_experts_are_put_together_by_their_busiest() -> None:
    load = [[0.0] * 256 for _ in range(70)]
    load[0][3] = load[69][255] = 2.0
    svg = ET.fromstring(heatmap(load, "load"))
    cells = {
        float(path.get("fill-opacity", "")): path.get("d", "").count("M") for path in by_class(svg, "path", "heat")
    }
    assert cells[1.0] == 2
    assert sum(cells.values()) == MOST_CELLS * 35


def test_figures_are_written_for_people() -> None:
    assert [usd(value) for value in (294_672, 12.3, 1.5, 0.0060934, 0)] == [
        "$294,672", "$12.30", "$1.50", "$0.00609", "$0",
    ]  # fmt: skip
    assert [clock(value) for value in (4.21, 65, 172, 443, 11_100)] == [
        "4.2 s", "65 s", "2 min 52 s", "7 min 23 s", "3 h 05 min",
    ]  # fmt: skip
    assert (percent(0.123), ratio(1.1, 1.0), ratio(1.0, 0.0), ratio(341.0, 1.0)) == (
        "12.3%",
        "1.10\u00d7",
        "\u2013",
        "341\u00d7",
    )
    money = column([0.0009, 0.000000399], "$")
    assert [money(value) for value in (0.0009, 0.000371, 0.000000399, 0.0, -0.0001)] == [
        "$0.000900", "$0.000371", "<$0.000001", "$0.000000", "-$0.000100",
    ]  # fmt: skip
    assert column([12.3456], "$")(0.5) == "$0.50"
    assert column([123456.0], "$")(1234.5) == "$1,234"


def test_text_of_others_is_shown_and_does_nothing() -> None:
    assert safe("<b>&\"'") == "&lt;b&gt;&amp;&quot;&#x27;"
    assert safe("a\x00b\u202ec\ud800d\x1b[31m") == "a\ufffdb\ufffdc\ufffdd\ufffd[31m"
    assert safe("line\r\n\tnext\n\u4f60\u597d") == "line\n\tnext\n\u4f60\u597d"
