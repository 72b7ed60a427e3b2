"""The curves of a task: quality by passes, ablations, exposure bias, quality in training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from harness.methods import METHODS
from harness.report.compare import by_setting
from harness.report.labels import counted
from harness.report.pairs import alike_but_one
from harness.report.rows import Row, headline, trains
from harness.report.statistics import Interval, t_interval
from harness.report.tables import plain_heading
from harness.runs.identity import settings_of

MOST_ABLATIONS = 12
"""Ablations that are shown."""


@dataclass(frozen=True)
class Line:
    """Values y at x with the half widths of their intervals; NaN where there is one seed."""

    label: str
    x: list[float]
    y: list[float]
    half_width: list[float]
    rows: list[str]
    """The run id of the first seed of the row behind each value."""


@dataclass(frozen=True)
class Panel:
    """Lines that share axes."""

    title: str
    x_label: str
    lines: list[Line]


@dataclass(frozen=True)
class Plot:
    """Panels with one caption.

    Attributes:
        log: whether both axes are logarithmic.
        bars: whether intervals are bars; bands otherwise.
        small: whether each panel has one line, so that three panels fit side by side.
        detail: whether it stands among the details, which a reader opens.
    """

    name: str
    caption: str
    y_label: str
    panels: list[Panel]
    log: bool = False
    bars: bool = False
    small: bool = False
    detail: bool = False


def task_plots(rows: Sequence[Row], equal: Sequence[Row], name: str) -> list[Plot]:
    """The plots that finished rows have data for, without rows of which a seed diverged.

    Args:
        equal: those of equal compute.
        name: the headline metric.
    """
    heading = plain_heading(name)
    rows, equal = ([row for row in of if not row.diverged] for of in (rows, equal))
    sets = ablations(rows, equal, name)
    more = len(sets) > MOST_ABLATIONS
    found = [
        _passes_plot(rows, equal, name),
        Plot(
            "ablations",
            f"{heading} where one number alone changes. Bars are 95 % intervals."
            + (f" The first {MOST_ABLATIONS} of {len(sets)} sets are shown." if more else ""),
            heading,
            sets[:MOST_ABLATIONS],
            bars=True,
            small=True,
        ),
        Plot(
            "exposure",
            "Exposure bias: root mean squared error on the student's own history "
            "minus that on the teacher's.",
            "error on own − on teacher's history",
            _panels(exposure_lines(rows), "step"),
            detail=True,
        ),
        Plot(
            "budget",
            f"{heading} at 1/8, 1/4, 1/2 and the whole of the budget, on noise set 0.",
            heading,
            _panels(budget_lines(rows), "images"),
            log=True,
            detail=True,
        ),
    ]
    return [plot for plot in found if plot.panels]


def _passes_plot(rows: Sequence[Row], equal: Sequence[Row], name: str) -> Plot:
    heading, lines = plain_heading(name), passes_lines(rows, equal, name)
    return Plot(
        "passes",
        f"{heading} by network passes a sample (a guided pass counts twice): "
        "methods after equal training FLOPs, and the teacher's own solvers.",
        heading,
        [Panel("", "network passes a sample", lines)] if lines else [],
        log=True,
        bars=True,
    )


def _panels(lines: dict[int, list[Line]], x_label: str) -> list[Panel]:
    drawn = {steps: [line for line in lines[steps] if line.x] for steps in sorted(lines)}
    return [Panel(counted(steps), x_label, drawn[steps]) for steps in drawn if drawn[steps]]


def _line(
    label: str, x: Sequence[float], intervals: Sequence[Interval], rows: Sequence[Row]
) -> Line:
    """A line through the values that are finite; it has one row for each, or one for all."""
    rows = rows if len(rows) == len(x) else [rows[0]] * len(x)
    points = [
        (float(at), i, row.records[0].run_id)
        for at, i, row in zip(x, intervals, rows, strict=True)
        if math.isfinite(i.mean)
    ]
    return Line(
        label,
        [at for at, _, _ in points],
        [i.mean for _, i, _ in points],
        [i.half_width if math.isfinite(i.half_width) else math.nan for _, i, _ in points],
        [run_id for *_, run_id in points],
    )


def _with_training(row: Row) -> str:
    return f"{row.label} ({row.training[0]} × {row.training[1]})"


def passes_lines(rows: Sequence[Row], equal: Sequence[Row], name: str) -> list[Line]:
    """The headline metric by network passes, for each setting with two numbers of steps or more.

    The lines are those of equal compute and, beside them, of the teacher's own solvers.
    """
    beside = [row for row in rows if not trains(row.records[0])] if equal else []
    lines = []
    for label, mine in by_setting(
        [row for row in [*equal, *beside] if row.finished[0].cost]
    ).items():
        passes = [row.finished[0].cost.nfe for row in mine if row.finished[0].cost]
        lines.append(_line(label, passes, [row.interval(name) for row in mine], mine))
    return [line for line in lines if len(line.x) > 1]


def exposure_lines(rows: Sequence[Row]) -> dict[int, list[Line]]:
    """By number of steps, the error on own history minus that on the teacher's, by step."""
    found: dict[int, list[Line]] = {}
    for row in rows:
        exposures = [record.exposure for record in row.finished if record.exposure]
        if not exposures or not row.training[0]:
            continue
        gaps = [
            [
                own - taught
                for own, taught in zip(e.on_own_history, e.on_teachers_history, strict=True)
            ]
            for e in exposures
        ]
        intervals = [t_interval(step) for step in zip(*gaps, strict=True)]
        found.setdefault(row.num_steps, []).append(
            _line(_with_training(row), range(1, len(intervals) + 1), intervals, [row])
        )
    return found


def budget_lines(rows: Sequence[Row]) -> dict[int, list[Line]]:
    """By number of steps, the headline metric at each part of the budget, over images."""
    found: dict[int, list[Line]] = {}
    for row in rows:
        curves = [record.milestones for record in row.finished if record.milestones]
        if not curves:
            continue
        name = headline([row])
        intervals = [
            t_interval([point.quality.get(name, math.nan) for point in points])
            for points in zip(*curves, strict=True)
        ]
        found.setdefault(row.num_steps, []).append(
            _line(_with_training(row), [point.images for point in curves[0]], intervals, [row])
        )
    return found


def ablations(rows: Sequence[Row], equal: Sequence[Row], name: str) -> list[Panel]:
    """A panel for each set of three trained rows or more that differ in one number.

    The number is an option or the number of steps. Rows of equal compute are not compared by their
    number of steps, which `passes_lines` shows.
    """
    trained = [row for row in rows if row.training[0] and row.records[0].method in METHODS.names()]
    sides = [
        {
            **settings_of(row.records[0].config),
            **row.options,
            "num_steps": row.num_steps,
            "row": (row.training, row.records[0].method),
        }
        for row in trained
    ]
    of_equal = set(map(id, equal))
    numbers = [
        {**row.options, **({} if id(row) in of_equal else {"num_steps": row.num_steps})}
        for row in trained
    ]
    axes = [[axis for axis, value in of.items() if type(value) in (int, float)] for of in numbers]
    found = []
    for (axis, _), places in alike_but_one(sides, axes).items():
        members = sorted(
            ((sides[place][axis], trained[place]) for place in places), key=lambda member: member[0]
        )
        if len({value for value, _ in members}) >= 3:
            found.append(_ablation(axis, members, name))
    return found


def _ablation(axis: str, members: Sequence[tuple[float, Row]], name: str) -> Panel:
    first = members[0][1]
    options = [f"{option} {value}" for option, value in first.off_task.items() if option != axis]
    steps = [] if axis == "num_steps" else [counted(first.num_steps)]
    title = ", ".join(
        [
            first.records[0].method,
            *options,
            *steps,
            f"trained {first.training[0]} × {first.training[1]}",
        ]
    )
    return Panel(
        title,
        axis,
        [
            _line(
                axis,
                [value for value, _ in members],
                [row.interval(name) for _, row in members],
                [row for _, row in members],
            )
        ],
    )
