"""The best rows of a task by number of steps: what a page says first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
OWN = "the teacher itself"
"""What the table calls the teacher's own output, to which distances are measured."""


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


@dataclass(frozen=True)
class Best:
    """A line of the best table: the best row of its number of steps and kind.

    Attributes:
        kind: what the row learns from.
        name: what the table calls it.
        next: the second best, if there is one.
    """

    kind: str
    row: Row
    name: str
    next: Row | None = None

    @property
    def title(self) -> str:
        """Such as "ect, 1 step"."""
        return f"{self.name}, {counted(self.row.num_steps)}"


def best_rows(rows: Sequence[Row], name: str, reference: Record | None) -> list[Best]:
    """The best row of each number of steps and kind; then the teacher's own output.

    Args:
        rows, name, reference: as in `ranked_by_kind`.
    """
    found = [
        Best(kind, ranked[0], ranked[0].label, ranked[1] if ranked[1:] else None)
        for (_, kind), ranked in ranked_by_kind(rows, name, reference).items()
    ]
    own = [row for row in rows if _is(row, reference)]
    return [*found, *(Best(FREE, row, OWN) for row in own[:1] if found)]


def best_table(best: Sequence[Best], name: str) -> pd.DataFrame:
    """The best rows, what is next to each, and what they cost.

    Args:
        name: the headline metric.
    """
    heading, lines = plain_heading(name), []
    for each in best:
        line = {
            "steps": str(each.row.num_steps),
            "learns": each.kind,
            "best": each.name,
            heading: _quality(each.row, name),
        }
        if each.name != OWN:
            line |= {
                "latency / teacher": _latency(each.row),
                "training TFLOPs": _bill(each.row),
                "next": each.next.label if each.next else "",
                f"its {heading}": _quality(each.next, name) if each.next else "",
            }
        lines.append(line)
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
