"""Small SVG figures for HTML pages: as wide as a telephone, with text that stays text."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.errors import printable
from harness.report.plots import Line

if TYPE_CHECKING:  # matplotlib takes a second to import
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

MOST_NAMED = 10
"""Curves with a colour and a name; the others are grey."""
MOST_GREY = 200
"""Grey curves that are drawn, at about equal distances, of more."""
MOST_SHAPES = 1000
"""Points that are drawn as shapes; more become one picture, which is faster and smaller."""


def curves_figure(
    curves: Sequence[Line], x_label: str, y_label: str, log: bool = False, bars: bool = False
) -> str:
    """Curves with their 95 % intervals; the ten that end lowest are named below."""
    ordered = sorted(curves, key=lambda curve: curve.y[-1])
    named = ordered[:MOST_NAMED]
    figure, axes = _figure(2.9 + (0.16 * len(named) + 0.1 if len(curves) > 1 else 0))
    others = ordered[MOST_NAMED:]
    for curve in others[:: max(1, len(others) // MOST_GREY)]:
        axes.plot(curve.x, curve.y, color="#c9ced8", linewidth=0.8, zorder=1)
    for number, curve in enumerate(named):
        _draw_curve(axes, curve, f"C{number}", bars)
    if log:
        values = [y for curve in curves for y in curve.y if y > 0]
        _set_log_x(axes, [x for curve in curves for x in curve.x])
        if values:
            set_log_limits(axes, values)
    elif len({x for curve in curves for x in curve.x}) <= 12:
        axes.set_xticks(sorted({x for curve in curves for x in curve.x}))
    if len(curves) > 1:
        more = f", and {len(curves) - MOST_NAMED} more in grey" if len(curves) > MOST_NAMED else ""
        figure.legend(
            loc="outside lower left",
            fontsize=7,
            frameon=False,
            title=f"best first{more}",
            title_fontsize=7,
        )
    return _svg(figure, axes, x_label, y_label)


def _draw_curve(axes: Axes, curve: Line, color: str, bars: bool) -> None:
    """Draws a named curve with its intervals, as bars or as a band."""
    half = [0.0 if math.isnan(width) else width for width in curve.half_width]
    style: dict[str, Any] = {"color": color, "marker": "o", "markersize": 3, "linewidth": 1.2}
    if bars:
        axes.errorbar(curve.x, curve.y, half, label=words(curve.label), capsize=2, **style)
        return
    axes.plot(curve.x, curve.y, label=_short(curve.label), **style)
    low, high = (
        [y + sign * width for y, width in zip(curve.y, half, strict=True)] for sign in (-1, 1)
    )
    axes.fill_between(curve.x, low, high, color=color, alpha=0.12, linewidth=0)


def pareto_figure(points: Sequence[tuple[str, float, float]], x_label: str, y_label: str) -> str:
    """Points (name, x, y) on logarithmic axes; the front of lowest x and y is named below."""
    front = pareto_front([(x, y) for _, x, y in points])
    figure, axes = _figure(3.0 + 0.16 * min(len(front), MOST_NAMED))
    axes.scatter(
        [x for _, x, _ in points],
        [y for *_, y in points],
        s=10,
        color="#9aa3b2",
        zorder=1,
        rasterized=len(points) > MOST_SHAPES,
    )
    axes.plot(
        [points[i][1] for i in front],
        [points[i][2] for i in front],
        color="#0b5fad",
        linewidth=1,
        alpha=0.5,
        zorder=2,
    )
    for number, i in enumerate(front[:MOST_NAMED], 1):
        name, x, y = points[i]
        axes.scatter(
            [x], [y], s=26, color="#0b5fad", zorder=3, label=f"{number}  {_short(name)}: {y:.3g}"
        )
        axes.annotate(str(number), (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    _set_log_x(axes, [x for _, x, _ in points])
    if all(y > 0 for *_, y in points):
        set_log_limits(axes, [y for *_, y in points])
    figure.legend(
        loc="outside lower left",
        fontsize=7,
        frameon=False,
        handlelength=0,
        handletextpad=0,
        markerscale=0,
    )
    return _svg(figure, axes, x_label, y_label)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of points that no other undercuts in both numbers, by the first number."""
    front, best = [], math.inf
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < best:
            front.append(i)
            best = points[i][1]
    return front


def _short(text: str, most: int = 62) -> str:
    return words(text if len(text) <= most else text[: most - 1] + "…")


def words(text: str) -> str:
    """A text that matplotlib draws as it is: it takes what stands between two $ for a formula."""
    return printable(text).replace("$", r"\$")


def set_log_limits(axes: Axes, values: Sequence[float]) -> None:
    """Makes the y axis logarithmic, with limits around positive values.

    Intervals do not count: that of two seeds may reach below 0.
    """
    axes.set_yscale("log")
    axes.set_ylim(min(values) / 1.5, max(values) * 1.5)
    _plain_ticks(axes.yaxis, min(values) / 1.5, max(values) * 1.5)


def _set_log_x(axes: Axes, values: Sequence[float]) -> None:
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis, min(values), max(values))


def _plain_ticks(axis: Axis, low: float, high: float) -> None:
    """Ticks of a logarithmic axis as plain numbers, which can be read on less than a decade too."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure, axes: Axes, x_label: str, y_label: str) -> str:
    import matplotlib as mpl

    axes.set_xlabel(x_label, fontsize=8)
    axes.set_ylabel(y_label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "harness"}):
        figure.savefig(text, format="svg", dpi=200, metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.DOTALL)
