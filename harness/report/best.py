"""The best rows of a task by number of steps: what a page says first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from harness.records import Record
from harness.report.labels import counted
from harness.report.rows import Row, trains
from harness.report.statistics import number
from harness.report.tables import QUALITY, plain_heading

STEPS = (1, 2, 4)
"""Numbers of steps that a page speaks of first."""
FREE, TAUGHT, DATA = "no training", "from the teacher", "from data alone"
"""What a row learns from, in the order of the table."""


def kind_of(row: Row) -> str | None:
    """What a row learns from; None for an untrained student and for work from elsewhere."""
    first = row.records[0]
    if not trains(first):
        return FREE if first.cost and not first.cost.training else None
    if not row.training[0]:
        return None
    return TAUGHT if first.target == "guided teacher" else DATA


def ranked_by_kind(
    rows: Sequence[Row], name: str, reference: Record | None
) -> dict[tuple[int, str], list[Row]]:
    """The rows of each number of steps and kind, the best first; none that diverged is the first.

    Args:
        rows: the rows that are compared with each other.
        name: the headline metric.
        reference: the teacher's own output, which is left out.
    """
    found = {}
    for steps in STEPS:
        for kind in (FREE, TAUGHT, DATA):
            mine = [row for row in rows if row.num_steps == steps and kind_of(row) == kind]
            mine = [row for row in mine if row.finished and not _is(row, reference)]
            ranked = sorted(mine, key=lambda row: row.interval(name).mean)
            if ranked and math.isfinite(ranked[0].interval(name).mean):
                found[steps, kind] = ranked
    return found


def best_table(rows: Sequence[Row], name: str, reference: Record | None) -> pd.DataFrame:
    """For each number of steps and kind of row the best one, the next, and what they cost.

    Args:
        rows, name: as in `ranked_by_kind`.
        reference: the teacher's own output, which stands in the last line.
    """
    heading, lines = plain_heading(name), []
    for (steps, kind), ranked in ranked_by_kind(rows, name, reference).items():
        lines.append(
            {
                "steps": str(steps),
                "learns": kind,
                "best": ranked[0].label,
                heading: _quality(ranked[0], name),
                "latency / teacher": _latency(ranked[0]),
                "training TFLOPs": _bill(ranked[0]),
                "next": ranked[1].label if ranked[1:] else "",
                f"its {heading}": _quality(ranked[1], name) if ranked[1:] else "",
            }
        )
    own = [row for row in rows if _is(row, reference)]
    if lines and own:
        last = {"steps": str(own[0].num_steps), "learns": FREE, "best": "the teacher itself"}
        lines.append({**last, heading: _quality(own[0], name)})
    return pd.DataFrame(lines).fillna("")


def leaders(rows: Sequence[Row], name: str, reference: Record | None) -> list[dict[str, str]]:
    """The leaders of a task: a line for each kind of row, with its best by number of steps."""
    ranked, lines = ranked_by_kind(rows, name, reference), []
    for kind in (FREE, TAUGHT, DATA):
        cells = {
            counted(steps): f"{_quality(of[0], name)}, {of[0].label}"
            for (steps, mine), of in ranked.items()
            if mine == kind
        }
        if cells:
            lines.append({"learns": kind, "metric": plain_heading(name), **cells})
    return lines


def _quality(row: Row, name: str) -> str:
    return row.text(name, QUALITY[name][1])


def _is(row: Row, reference: Record | None) -> bool:
    return reference is not None and any(
        record.run_id == reference.run_id for record in row.records
    )


def _latency(row: Row) -> str:
    costs = [record.cost.latency for record in row.finished if record.cost]
    return number(costs[0].ratio, ".3f") if costs and costs[0] else ""


def _bill(row: Row) -> str:
    costs = [record.cost.training for record in row.finished if record.cost]
    return f"{costs[0].whole_flops / 1e12:.1f}" if costs and costs[0] else "0"
