"""The best rows of a task by number of steps: what a page says first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from harness.records import Record
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


def best_table(rows: Sequence[Row], name: str, reference: Record | None) -> pd.DataFrame:
    """For each number of steps and kind of row the best one, the next, and what they cost.

    Args:
        rows: the rows that are compared with each other.
        name: the headline metric.
        reference: the teacher's own output, which stands in the last line.
    """
    _, digits = QUALITY[name]
    heading = plain_heading(name)
    lines = []
    for steps in STEPS:
        for kind in (FREE, TAUGHT, DATA):
            mine = [row for row in rows if row.num_steps == steps and kind_of(row) == kind]
            mine = [row for row in mine if row.finished and not _is(row, reference)]
            ranked = sorted(mine, key=lambda row: row.interval(name).mean)
            if ranked and math.isfinite(ranked[0].interval(name).mean):
                lines.append(
                    {
                        "steps": str(steps),
                        "learns": kind,
                        "best": ranked[0].label,
                        heading: ranked[0].text(name, digits),
                        "latency / teacher": _latency(ranked[0]),
                        "training TFLOPs": _bill(ranked[0]),
                        "next": ranked[1].label if ranked[1:] else "",
                        f"its {heading}": ranked[1].text(name, digits) if ranked[1:] else "",
                    }
                )
    own = [row for row in rows if _is(row, reference)]
    if lines and own:
        last = {"steps": str(own[0].num_steps), "learns": FREE, "best": "the teacher itself"}
        lines.append({**last, heading: own[0].text(name, digits)})
    return pd.DataFrame(lines).fillna("")


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
