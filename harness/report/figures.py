"""Plots of HTML pages as SVG: every point is a link that names its row.

They are drawn here, in text that a style sheet colours. Plotly or Vega would add up to 4.7 MB to
each page, draw nothing without JavaScript, and give a keyboard no point to go to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from harness.report.markup import escaped
from harness.report.plots import Panel, Plot

MOST_COLOURED = 8
"""Lines with a colour and a name below the plot; touching names the others, which are grey."""
WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 388, 26, 226
"""Edges of the axes."""
LETTER = 6.6
"""Width of a digit."""
MOST_TICKS = 7
SHAPES = (
    "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0",
    "m-3-3h6v6h-6z",
    "m0-4.5l4.5 4.5l-4.5 4.5l-4.5-4.5z",
    "m0-4l4 7h-8z",
)
"""Marks from their centre, so that colour alone tells no two lines apart."""


class Named(NamedTuple):
    """A row as the page knows it: the id of its part of the page, and its name."""

    anchor: str
    name: str


class Point(NamedTuple):
    """A value y at x; `half_width` is NaN without an interval."""

    x: float
    y: float
    half_width: float
    row: Named


@dataclass(frozen=True)
class Axis:
    """Numbers to places between `start` and `end`."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    @classmethod
    def around(cls, values: Iterable[float], log: bool, start: float, end: float) -> Axis:
        """An axis with room around values; logarithmic only if all of them are positive."""
        values = list(values)
        low, high, log = min(values), max(values), log and min(values) > 0
        if log:
            spread = max((high / low) ** 0.06, 1.1)
            return cls(low / spread, high * spread, log, start, end)
        room = 0.06 * (high - low) or abs(high) / 2 or 1.0
        return cls(low - room, high + room, log, start, end)

    def at(self, value: float) -> float:
        """The place of a value, at an edge for one outside."""
        low, high = (math.log(x) if self.log else x for x in (self.low, self.high))
        if self.log:
            value = math.log(value) if value > 0 else low
        part = min(max((value - low) / (high - low), 0.0), 1.0)
        return self.start + part * (self.end - self.start)

    @cached_property
    def ticks(self) -> list[float]:
        """At most `MOST_TICKS` round numbers on the axis."""
        exponents = range(math.floor(math.log10(self.low)), 20) if self.log else ()
        for subs in ((1, 2, 5), (1, 3), (1,)):
            found = [s * 10.0**e for e in exponents for s in subs]
            found = [value for value in found if self.low <= value <= self.high]
            if 2 <= len(found) <= MOST_TICKS:
                return found
        if self.log and len(found) > MOST_TICKS:
            return found[:: math.ceil(len(found) / MOST_TICKS)]
        rough = 10.0 ** math.floor(math.log10((self.high - self.low) / MOST_TICKS))
        step = next(
            m * rough for m in (1, 2, 5, 10) if self.high - self.low < MOST_TICKS * m * rough
        )
        first = math.ceil(self.low / step)
        return [number * step for number in range(first, math.floor(self.high / step) + 1)]


def number_text(value: float) -> str:
    """A tick's number: few letters, no exponent below a million million."""
    value = 0.0 if abs(value) < 1e-12 else value
    if abs(value) >= 1e6:
        return f"{value / 1e6:g} M"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def curves_figure(panel: Panel, plot: Plot, rows: Mapping[str, Named]) -> str:
    """A panel of curves with its legend: those that end lowest have colours.

    Args:
        rows: what the page knows of the rows, by run id of their first seeds.
    """
    lines = sorted(panel.lines, key=lambda line: line.y[-1])
    points = [
        [
            Point(x, y, half, rows[run_id])
            for x, y, half, run_id in zip(line.x, line.y, line.half_width, line.rows, strict=True)
        ]
        for line in lines
    ]
    x_axis = Axis.around((x for line in lines for x in line.x), plot.log, LEFT, RIGHT)
    y_axis = Axis.around((y for line in lines for y in line.y), plot.log, BOTTOM, TOP)
    x_values = sorted({x for line in lines for x in line.x})
    axes = _axes(x_axis, y_axis, x_values if len(x_values) <= 12 else x_axis.ticks)
    labels = panel.x_label, plot.y_label
    drawn = [
        _line(number, points[number], x_axis, y_axis, labels)
        for number in reversed(range(len(lines)))
    ]
    legend = [
        f'<li data-line="{number}">{_key(number)}{escaped(line.label)}</li>'
        for number, line in enumerate(lines[:MOST_COLOURED])
        if len(lines) > 1
    ]
    if len(lines) > MOST_COLOURED:
        legend.append(
            f"<li>{len(lines) - MOST_COLOURED} more, which end higher, are grey; "
            "touch one for its name</li>"
        )
    title = f"{plot.y_label} by {panel.x_label}" + (f", {panel.title}" if panel.title else "")
    return _svg(title, labels, axes + "".join(drawn)) + _list("ul", legend)


def pareto_figure(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Points on logarithmic axes; the front of lowest x and y is joined and named below."""
    front = pareto_front([(point.x, point.y) for point in points])
    x_axis = Axis.around((point.x for point in points), True, LEFT, RIGHT)
    y_axis = Axis.around((point.y for point in points), True, BOTTOM, TOP)
    labels, of_front = (x_label, y_label), [points[i] for i in front]
    others = [point for i, point in enumerate(points) if i not in {*front}]
    drawn = [
        f'<g class="line rest alone">{_marks(others, x_axis, y_axis, labels, SHAPES[0])}</g>',
        _line(0, of_front, x_axis, y_axis, labels),
    ]
    legend = [
        f'<li><a href="#{point.row.anchor}">{escaped(point.row.name)}</a>: {point.y:.3g}</li>'
        for point in of_front
    ]
    axes = _axes(x_axis, y_axis, x_axis.ticks)
    title = f"{y_label} against {x_label}, one point a row"
    return _svg(title, labels, axes + "".join(drawn)) + _list("ol", legend)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of points that no other undercuts in both numbers, by the first number."""
    front, best = [], math.inf
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < best:
            front.append(i)
            best = points[i][1]
    return front


def _line(
    number: int, points: Sequence[Point], x_axis: Axis, y_axis: Axis, labels: tuple[str, str]
) -> str:
    """A curve with its intervals and its points."""
    places = [(x_axis.at(point.x), y_axis.at(point.y)) for point in points]
    bars = "".join(
        f"M{x:.1f} {y_axis.at(point.y - point.half_width):.1f}"
        f"V{y_axis.at(point.y + point.half_width):.1f}"
        for (x, _), point in zip(places, points, strict=True)
        if not math.isnan(point.half_width)
    )
    trace = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    bars = f'<path class="bars" d="{bars}"/>' if bars else ""
    marks = _marks(points, x_axis, y_axis, labels, SHAPES[number % len(SHAPES)])
    return (
        f'<g class="line {_colour(number)}" data-line="{number}">'
        f'<path class="trace" d="{trace}"/>{bars}{marks}</g>'
    )


def _marks(
    points: Iterable[Point], x_axis: Axis, y_axis: Axis, labels: tuple[str, str], shape: str
) -> str:
    """Points as links to their rows, each with its name as a title."""
    found = []
    for point in points:
        x, y = x_axis.at(point.x), y_axis.at(point.y)
        width = "" if math.isnan(point.half_width) else f" ± {point.half_width:.3g}"
        where = f"{labels[0]} {number_text(point.x)}"
        text = escaped(f"{point.row.name}: {labels[1]} {point.y:.4g}{width}, {where}")
        found.append(
            f'<a href="#{point.row.anchor}" data-row="{point.row.anchor}" data-x="{x:.1f}" '
            f'data-y="{y:.1f}"><title>{text}</title><path d="M{x:.1f} {y:.1f}{shape}"/></a>'
        )
    return "".join(found)


def _axes(x_axis: Axis, y_axis: Axis, x_ticks: Iterable[float]) -> str:
    """Grid lines and numbers; a number that would touch the one before it is left out."""
    found, free = [], -math.inf
    for value in x_ticks:
        x, text = x_axis.at(value), number_text(value)
        half = LETTER * len(text) / 2
        found.append(f'<path class="grid" d="M{x:.1f} {TOP}V{BOTTOM}"/>')
        if x - half > free:
            free = x + half + LETTER
            found.append(f'<text x="{x:.1f}" y="{BOTTOM + 16}" text-anchor="middle">{text}</text>')
    for value in y_axis.ticks:
        y = y_axis.at(value)
        found.append(
            f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number_text(value)}</text>'
        )
    return "".join(found)


def _svg(title: str, labels: tuple[str, str], inner: str) -> str:
    x_label, y_label = map(escaped, labels)
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" '
        f'aria-label="{escaped(title)}">{inner}'
        f'<text x="{LEFT}" y="14" class="label">{y_label}</text>'
        f'<text x="{RIGHT}" y="{BOTTOM + 36}" class="label" text-anchor="end">{x_label}</text>'
        "</svg>"
    )


def _colour(number: int) -> str:
    return f"c{number}" if number < MOST_COLOURED else "rest"


def _key(number: int) -> str:
    """A line and its mark, as the legend shows them."""
    shape = SHAPES[number % len(SHAPES)]
    return (
        f'<svg class="key" viewBox="-11 -7 22 14" aria-hidden="true"><g class="line c{number}">'
        f'<path class="trace" d="M-11 0H11"/><path d="M0 0{shape}"/></g></svg>'
    )


def _list(kind: str, items: Sequence[str]) -> str:
    return f'<{kind} class="legend">{"".join(items)}</{kind}>' if items else ""
