"""Plots as PNG files, for pages that are committed."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from harness.asides import write_aside
from harness.errors import printable
from harness.report.plots import Line, Panel, Plot

if TYPE_CHECKING:  # matplotlib takes a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMED = 30
"""Lines of a panel with a colour and a name; the others are grey."""


def write_plots(plots: Sequence[Plot], folder: Path) -> None:
    """Writes each plot to `<folder>/<name>.png`."""
    for plot in plots:
        figure = _small_panels(plot) if plot.small else _wide_panels(plot)
        write_aside(folder / f"{plot.name}.png", partial(figure.savefig, format="png"))


def _wide_panels(plot: Plot) -> Figure:
    """One panel below the other, each with its legend beside it."""
    from matplotlib.figure import Figure

    heights = [max(2.6, 0.21 * min(len(panel.lines), MOST_NAMED) + 0.8) for panel in plot.panels]
    figure = Figure(figsize=(14, sum(heights) + 0.4), layout="constrained", dpi=100)
    grid = figure.subplots(
        len(plot.panels), 2, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for (axes, beside), panel in zip(grid, plot.panels, strict=True):
        _draw(axes, panel, plot)
        beside.axis("off")
        more = (
            f"and {len(panel.lines) - MOST_NAMED} higher ones in grey"
            if len(panel.lines) > MOST_NAMED
            else None
        )
        beside.legend(
            *axes.get_legend_handles_labels(),
            loc="center left",
            fontsize=8,
            frameon=False,
            title=more,
            title_fontsize=8,
        )
    return figure


def _draw(axes: Axes, panel: Panel, plot: Plot) -> None:
    """Lines with 95 % t intervals over seeds; of many, those that end highest are grey."""
    ordered = sorted(panel.lines, key=lambda line: -line.y[-1])
    for line in ordered[:-MOST_NAMED]:
        axes.plot(line.x, line.y, color="#c9ced8", linewidth=0.8, zorder=1)
    for number, line in enumerate(ordered[-MOST_NAMED:]):
        _draw_line(axes, line, number, plot.bars)
    _set_ticks(axes, panel.lines, plot.log)
    axes.set_title(words(panel.title), loc="left", fontsize=10)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(plot.y_label)
    axes.grid(alpha=0.3)


def _draw_line(axes: Axes, line: Line, number: int, bars: bool) -> None:
    color, marker = f"C{number % 10}", "osD^v*"[number // 10 % 6]
    half = [0.0 if math.isnan(width) else width for width in line.half_width]
    if bars:
        axes.errorbar(
            line.x,
            line.y,
            half,
            label=words(line.label),
            capsize=3,
            elinewidth=0.8,
            color=color,
            marker=marker,
            markersize=4,
            linewidth=1.3,
        )
        return
    axes.plot(
        line.x,
        line.y,
        label=words(line.label),
        color=color,
        marker=marker,
        markersize=4,
        linewidth=1.3,
    )
    low, high = (
        [y + sign * width for y, width in zip(line.y, line.half_width, strict=True)]
        for sign in (-1, 1)
    )
    axes.fill_between(line.x, low, high, color=color, alpha=0.12, linewidth=0)


def _set_ticks(axes: Axes, lines: Sequence[Line], log: bool) -> None:
    """A tick at each x; powers of 2 where those of a logarithmic axis are too near to be read."""
    if log:
        axes.set_xscale("log")
        set_log_limits(axes, [y for line in lines for y in line.y])
    ticks = sorted({x for line in lines for x in line.x})
    if log and any(b < 1.3 * a for a, b in pairwise(ticks)):
        first, last = math.ceil(math.log2(ticks[0])), math.floor(math.log2(ticks[-1]))
        ticks = [2.0**power for power in range(first, last + 1)]
    axes.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
    axes.minorticks_off()


def _small_panels(plot: Plot) -> Figure:
    """Three small panels side by side, with intervals as bars."""
    from matplotlib.figure import Figure

    columns = min(3, len(plot.panels))
    lines = math.ceil(len(plot.panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * lines), layout="constrained", dpi=100)
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, panel in zip(grid, plot.panels, strict=False):
        (curve,) = panel.lines
        half = [0.0 if math.isnan(width) else width for width in curve.half_width]
        axes.errorbar(curve.x, curve.y, half, marker="o", markersize=4, linewidth=1.3, capsize=3)
        axes.set_title("\n".join(textwrap.wrap(words(panel.title), 52)), loc="left", fontsize=9)
        axes.set_xlabel(panel.x_label)
        axes.set_ylabel(plot.y_label)
        axes.set_xticks(sorted(set(curve.x)))
        axes.grid(alpha=0.3)
    for axes in grid[len(plot.panels) :]:
        axes.axis("off")
    return figure


def set_log_limits(axes: Axes, values: Sequence[float]) -> None:
    """Makes the y axis logarithmic, with plain numbers as ticks and limits around positive values.

    Intervals do not count: that of two seeds may reach below 0.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = min(values) / 1.5, max(values) * 1.5
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def words(text: str) -> str:
    """A text that matplotlib draws as it is: it takes what stands between two $ for a formula."""
    return printable(text).replace("$", r"\$")
