"""Charts as inline SVG: drawn here, so that a page needs neither a library nor a script.

Colours are classes of ``style.css``, so that they follow the page into the dark. Every chart has a title and a
description for those who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ds_lightning.report.text import safe

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 22, 42

Points = Sequence[tuple[float, float]]
Format = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """A line of a chart; a part is drawn without a join to the next."""

    label: str
    parts: Sequence[Points]
    style: str = "main"
    """``main`` or ``second``: a class."""
    dots: bool = True


@dataclass(frozen=True)
class Chart:
    """What a line chart shows."""

    title: str
    description: str
    lines: Sequence[Line]
    x_label: str
    x_format: Format
    y_format: Format
    levels: Sequence[tuple[str, float]] = ()
    """Horizontal lines to compare with, by label."""
    bands: Sequence[tuple[str, float, float]] = ()
    """Numbered stretches of the x axis: what stands on them, start and end."""
    from_zero: bool = False
    """Whether the y axis begins at zero."""


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return at most ``most`` round numbers inside an interval: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / most)) if high > low else 1.0
    for factor in (1, 2, 5, 10, 20, 50):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return [index * step for index in range(first, last + 1)]
    return [low]


def line_chart(chart: Chart) -> str:
    """Return a chart of lines; points that are not finite are left out."""
    lines = [Line(line.label, [_finite(part) for part in line.parts], line.style, line.dots) for line in chart.lines]
    points = [point for line in lines for part in line.parts for point in part]
    if not points:
        return ""
    x, y = _scales(chart, points)
    body = [_bands(chart, x), _y_axis(chart, y), _x_axis(chart, x)]
    for label, level in chart.levels:
        body.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>')
        body.append(
            f'<text class="note" x="{WIDTH - RIGHT}" y="{y(level) - 4:.1f}" text-anchor="end">{safe(label)}</text>'
        )
    for line in lines:
        body += [_polyline(part, line, x, y) for part in line.parts if part]
    return _svg(chart.title, chart.description, WIDTH, HEIGHT, "".join(body))


def _scales(chart: Chart, points: Points) -> tuple[_Scale, _Scale]:
    xs = [x for x, _ in points] + [edge for _, start, end in chart.bands for edge in (start, end)]
    ys = [y for _, y in points] + [level for _, level in chart.levels]
    right = max(xs) or 1.0
    low, high = (0.0 if chart.from_zero else min(ys)), max(ys)
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    low = low if chart.from_zero else low - room
    return _Scale(0.0, right, LEFT, WIDTH - RIGHT), _Scale(low, high + room, HEIGHT - BOTTOM, TOP)


def _finite(points: Points) -> Points:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _polyline(points: Points, line: Line, x: _Scale, y: _Scale) -> str:
    path = "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)
    drawn = f'<path class="line {line.style}" d="{path}"/>' if len(points) > 1 else ""
    if line.dots and len(points) <= 40:
        drawn += "".join(
            f'<circle class="dot {line.style}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.6"/>' for a, b in points
        )
    return drawn


def _bands(chart: Chart, x: _Scale) -> str:
    drawn = ""
    for index, (_, start, end) in enumerate(chart.bands):
        left, width = x(start), x(end) - x(start)
        if index % 2 == 0:
            drawn += (
                f'<rect class="band" x="{left:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT - TOP - BOTTOM}"/>'
            )
        drawn += f'<text class="note" x="{left + width / 2:.1f}" y="{TOP - 7}" text-anchor="middle">{index + 1}</text>'
    return drawn


def _y_axis(chart: Chart, y: _Scale) -> str:
    drawn = ""
    for value in ticks(y.low, y.high):
        at = f"{y(value):.1f}"
        drawn += f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>'
        drawn += f'<text x="{LEFT - 7}" y="{y(value) + 3.8:.1f}" text-anchor="end">{safe(chart.y_format(value))}</text>'
    return drawn


def _x_axis(chart: Chart, x: _Scale) -> str:
    bottom = HEIGHT - BOTTOM
    drawn = f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    for value in ticks(x.low, x.high):
        anchor = "end" if x(value) > WIDTH - RIGHT - 12 else "middle"
        drawn += (
            f'<text x="{x(value):.1f}" y="{bottom + 16}" text-anchor="{anchor}">{safe(chart.x_format(value))}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    return (
        drawn + f'<text class="note" x="{middle}" y="{bottom + 34}" text-anchor="middle">{safe(chart.x_label)}</text>'
    )


def sparkline(points: Points, title: str) -> str:
    """Return a small line without axes."""
    points = _finite(points)
    if len(points) < 2:
        return ""
    (left, right), (low, high) = ((min(v), max(v)) for v in zip(*points, strict=True))
    x = _Scale(left, right if right > left else left + 1, 3, 137)
    y = _Scale(low, high if high > low else low + 1, 37, 3)
    line = Line(title, [points], dots=False)
    end = f'<circle class="dot main" cx="{x(points[-1][0]):.1f}" cy="{y(points[-1][1]):.1f}" r="2.6"/>'
    return _svg(title, f"from {points[0][1]:.4g} to {points[-1][1]:.4g}", 140, 40, _polyline(points, line, x, y) + end)


def stacked_bar(parts: Sequence[tuple[str, float, str]], title: str) -> str:
    """Return one bar of parts: words, size and class of each."""
    total, at, body = sum(size for _, size, _ in parts), 0.0, ""
    if total <= 0:
        return ""
    for _, size, style in parts:
        width = size / total * 600
        body += f'<rect class="{style}" x="{at:.2f}" y="0" width="{max(0.0, width - 1):.2f}" height="22"/>'
        at += width
    description = ", ".join(f"{words} {size / total:.1%}" for words, size, _ in parts)
    return _svg(title, description, 600, 22, body, 'preserveAspectRatio="none" class="bar"')


LEVELS = 8
"""Shades of a heatmap: of no load up to twice the fair share."""

MOST_CELLS = 64
"""Rows and columns of a heatmap; more are put together by their largest."""


def heatmap(load: Sequence[Sequence[float]], title: str) -> str:
    """Return the load of experts, as a ratio to their layer's mean: a row a layer, a column an expert."""
    cells = _pooled([[value for (value,) in _pooled([(value,) for value in row])] for row in load])
    if not cells or not cells[0]:
        return ""
    columns, rows = len(cells[0]), len(cells)
    width, height = 384 / columns, min(22.0, max(6.0, 384 / columns))
    shades: dict[int, str] = {}
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            level = min(LEVELS, max(0, round(value / 2 * LEVELS)))
            path = f"M{column * width + 28:.2f} {row * height:.2f}h{width - 1:.2f}v{height - 1:.2f}h{1 - width:.2f}z"
            shades[level] = shades.get(level, "") + path
    body = "".join(
        f'<path class="heat" fill-opacity="{0.04 + 0.96 * k / LEVELS:.2f}" d="{d}"/>' for k, d in shades.items()
    )
    step = max(1, -(-rows // 16))
    for row in range(0, rows, step):
        body += f'<text class="note" x="22" y="{(row + 0.5) * height + 3.5:.1f}" text-anchor="end">{row + 1}</text>'
    most, least = (edge(value for row in load for value in row) for edge in (max, min))
    size = f"{len(load)} layers of {len(load[0])} experts"
    description = f"{size}; the busiest has {most:.2f}, the idlest {least:.2f} of a fair share"
    return _svg(title, description, 414, math.ceil(rows * height), body)


def _pooled(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return at most :data:`MOST_CELLS` rows, each the largest values of those it stands for."""
    size = -(-len(rows) // MOST_CELLS)
    return [
        [max(values) for values in zip(*rows[at : at + size], strict=True)] for at in range(0, len(rows), size or 1)
    ]


def _svg(title: str, description: str, width: int, height: int, body: str, attributes: str = "") -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" {attributes}><title>{safe(title)}</title>'
        f"<desc>{safe(description)}</desc>{body}</svg>"
    )
