"""Pictures of a task's rows: quality by number of passes, ablations, exposure bias by step, and quality along the budget."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from harness.files import write_aside
from harness.methods import METHODS
from harness.report.compare import by_setting, equal_compute
from harness.report.rows import Row, alike_but_one, counted, headline, trains
from harness.report.statistics import metric_interval, t_interval
from harness.report.tables import QUALITY
from harness.runs.identity import settings_of

MOST_NAMED, MOST_ABLATIONS = 30, 12
"""Lines with a colour and a name in a panel, and ablations that are shown."""

BY_PASSES = "by network passes a sample (a guided one is two), after equal training FLOPs, and of the teacher's own solvers."
"""What is said of `passes_lines`."""


@dataclass(frozen=True)
class Line:
    """One row's values y at x, with half widths of their intervals (NaN where there is one seed)."""

    label: str
    x: list[float]
    y: list[float]
    half_width: list[float]


def passes_lines(rows: Sequence[Row]) -> list[Line]:
    """The headline metric by network passes a sample, for each setting with two numbers of steps or more: of what was trained for equal
    FLOPs, and of the teacher's own solvers beside it.
    """
    equal = equal_compute(rows)
    beside = [row for row in rows if row.finished and not trains(row.records[0])] if equal else []
    lines = []
    for label, mine in by_setting([row for row in [*equal, *beside] if row.finished[0].cost]).items():
        intervals = [metric_interval(row.finished, headline(rows)) for row in mine]
        passes = [row.finished[0].cost.nfe for row in mine if row.finished[0].cost]
        lines.append(Line(label, passes, [i.mean for i in intervals], [i.half_width for i in intervals]))
    return [line for line in lines if len(line.x) > 1]


def exposure_lines(rows: Sequence[Row]) -> dict[str, list[Line]]:
    """For each number of steps, the gap between a row's error on its own history and on the teacher's, after each step."""
    panels: dict[str, list[Line]] = {}
    for row in sorted(rows, key=lambda row: row.num_steps):
        exposures = [record.exposure for record in row.finished if record.exposure]
        if not exposures or not row.training[0]:
            continue
        gaps = [[own - taught for own, taught in zip(e.on_own_history, e.on_teachers_history, strict=True)] for e in exposures]
        intervals = [t_interval(step) for step in zip(*gaps, strict=True)]
        line = Line(f"{row.label} ({row.training[0]} × {row.training[1]})", [float(i + 1) for i in range(len(intervals))],
                    [i.mean for i in intervals], [i.half_width for i in intervals])  # fmt: skip
        panels.setdefault(counted(row.num_steps), []).append(line)
    return panels


def budget_lines(rows: Sequence[Row]) -> dict[str, list[Line]]:
    """For each number of steps, the headline metric of noise set 0 at 1/8, 1/4, 1/2 and the whole of the budget, over images."""
    panels: dict[str, list[Line]] = {}
    for row in sorted(rows, key=lambda row: row.num_steps):
        curves = [record.milestones for record in row.finished if record.milestones]
        if not curves:
            continue
        name = headline([row])
        intervals = [t_interval([point.quality[name] for point in points]) for points in zip(*curves, strict=True)]
        name, images = f"{row.label} ({row.training[0]} × {row.training[1]})", [float(point.images) for point in curves[0]]
        line = Line(name, images, [i.mean for i in intervals], [i.half_width for i in intervals])
        panels.setdefault(counted(row.num_steps), []).append(line)
    return panels


def write_plot(path: Path, panels: dict[str, list[Line]], x_label: str, y_label: str, log: bool = False, bars: bool = False) -> None:
    """One panel below the other, each with its legend beside it; half-transparent bands, or bars, are 95 % t intervals over seeds. Of
    many lines those that end highest are grey and have no name.
    """
    from matplotlib.figure import Figure  # here: it takes a second to import

    heights = [max(2.6, 0.21 * min(len(lines), MOST_NAMED) + 0.8) for lines in panels.values()]
    figure = Figure(figsize=(14, sum(heights) + 0.4), layout="constrained", dpi=100)
    grid = figure.subplots(len(panels), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
    for (axes, beside), (title, lines) in zip(grid, panels.items(), strict=True):
        ordered = sorted(lines, key=lambda line: -line.y[-1])
        for line in ordered[:-MOST_NAMED]:
            axes.plot(line.x, line.y, color="#c9ced8", linewidth=0.8, zorder=1)
        for number, line in enumerate(ordered[-MOST_NAMED:]):
            style = {"color": f"C{number % 10}", "marker": "osD^v*"[number // 10 % 6], "markersize": 4, "linewidth": 1.3}
            if bars:
                half = [0.0 if math.isnan(width) else width for width in line.half_width]
                axes.errorbar(line.x, line.y, half, label=line.label, capsize=3, elinewidth=0.8, **style)
                continue
            axes.plot(line.x, line.y, label=line.label, **style)
            low, high = ([y + sign * h for y, h in zip(line.y, line.half_width, strict=True)] for sign in (-1, 1))
            axes.fill_between(line.x, low, high, color=style["color"], alpha=0.12, linewidth=0)
        if log:
            axes.set_xscale("log")
            axes.set_yscale("log")
            set_log_limits(axes, [y for line in lines for y in line.y])
        ticks = sorted({x for line in lines for x in line.x})
        if log and any(b < 1.3 * a for a, b in pairwise(ticks)):  # too near to be read: powers of 2 between them
            first, last = math.ceil(math.log2(ticks[0])), math.floor(math.log2(ticks[-1]))
            ticks = [2.0**power for power in range(first, last + 1)]
        axes.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
        axes.minorticks_off()
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.3)
        beside.axis("off")
        more = f"and {len(lines) - MOST_NAMED} higher ones in grey" if len(lines) > MOST_NAMED else None
        beside.legend(*axes.get_legend_handles_labels(), loc="center left", fontsize=8, frameon=False, title=more, title_fontsize=8)
    write_aside(path, lambda aside: figure.savefig(aside, format="png"))


def set_log_limits(axes, values: Sequence[float]) -> None:  # type: ignore[no-untyped-def]  # matplotlib takes a second to import
    """Limits of a logarithmic y axis around positive values (an interval of two seeds may reach below 0), and numbers that are read on
    less than a decade, too.
    """
    from matplotlib.ticker import LogLocator

    low, high = min(values) / 1.5, max(values) * 1.5
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")


def ablations(rows: Sequence[Row], name: str) -> list[tuple[str, Line]]:
    """Trained rows that differ in one number among their options, or in the number of steps alone (but for those of `passes_lines`): a
    title and a curve for each set of three, the first dozen.
    """
    trained = [row for row in rows if row.training[0] and row.records[0].method in METHODS.names()]
    sides = [{**settings_of(row.records[0].config), **row.options, "num_steps": row.num_steps, "row": (row.training, row.records[0].method)}
             for row in trained]  # fmt: skip
    equal = set(map(id, equal_compute(rows)))
    numbers = [{**row.options, **({} if id(row) in equal else {"num_steps": row.num_steps})} for row in trained]
    axes = [[axis for axis, value in of.items() if type(value) in (int, float)] for of in numbers]
    found = []
    for (axis, _), places in alike_but_one(sides, axes).items():
        members = sorted(((sides[place][axis], trained[place]) for place in places), key=lambda member: member[0])
        if len({value for value, _ in members}) < 3:
            continue
        intervals = [metric_interval(row.finished, name) for _, row in members]
        curve = Line(axis, [float(value) for value, _ in members], [i.mean for i in intervals], [i.half_width for i in intervals])
        first = members[0][1]
        told = [f"{option} {value}" for option, value in first.off_default.items() if option != axis]
        steps = [] if axis == "num_steps" else [counted(first.num_steps)]
        budget = f"trained {first.training[0]} × {first.training[1]}"
        found.append((", ".join([first.records[0].method, *told, *steps, budget]), curve))
    return found[:MOST_ABLATIONS]


def write_ablations(path: Path, curves: Sequence[tuple[str, Line]], y_label: str) -> None:
    """A small panel for each curve, with 95 % t intervals over seeds as bars."""
    from matplotlib.figure import Figure

    columns = min(3, len(curves))
    lines = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * lines), layout="constrained", dpi=100)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (title, curve) in zip(panels, curves, strict=False):
        half = [0.0 if math.isnan(width) else width for width in curve.half_width]
        axes.errorbar(curve.x, curve.y, half, marker="o", markersize=4, linewidth=1.3, capsize=3)
        axes.set_title("\n".join(textwrap.wrap(title, 52)), loc="left", fontsize=9)
        axes.set_xlabel(curve.label)
        axes.set_ylabel(y_label)
        axes.set_xticks(sorted(set(curve.x)))
        axes.grid(alpha=0.3)
    for axes in panels[len(curves) :]:
        axes.axis("off")
    write_aside(path, lambda aside: figure.savefig(aside, format="png"))


def write_plots(rows: Sequence[Row], folder: Path) -> list[tuple[str, str]]:
    """Writes the plots that the rows have data for.

    Returns:
        File name and caption of each.
    """
    made = []
    trained = [row for row in rows if row.finished]
    heading = QUALITY[headline(rows)][0].rstrip(" ↓↑") if trained else ""
    if lines := passes_lines(rows):
        write_plot(folder / "passes.png", {"": lines}, "network passes a sample", heading, log=True, bars=True)
        made.append(("passes.png", f"{heading} {BY_PASSES}"))
    if trained and (curves := ablations(trained, headline(rows))):
        write_ablations(folder / "ablations.png", curves, heading)
        made.append(("ablations.png", f"{heading} where one number alone changes. Bars are 95 % intervals over seeds."))
    if panels := exposure_lines(rows):
        write_plot(folder / "exposure.png", panels, "step", "error on own − on teacher's history")
        made.append(("exposure.png", "Exposure bias: root mean squared error on the student's own history minus that on the teacher's."))
    if panels := budget_lines(rows):
        write_plot(folder / "budget.png", panels, "images", heading, log=True)
        made.append(("budget.png", f"{heading} at 1/8, 1/4, 1/2 and the whole of the budget, on noise set 0."))
    return made
