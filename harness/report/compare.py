"""Methods at equal training FLOPs or at equal numbers of images."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pandas as pd
from pydantic import ValidationError

from harness.methods import METHODS
from harness.records import Milestone, Record
from harness.report.labels import counted
from harness.report.pairs import Compared, comparable
from harness.report.rows import Row
from harness.report.statistics import t_interval
from harness.report.tables import QUALITY

FEWEST = 5
"""Methods that a comparison at equal cost needs."""
APART = 0.02
"""Largest relative difference of total training FLOPs that count as equal."""
ABOVE = "above the best"
"""The column of differences."""


def equal_compute(rows: Sequence[Row]) -> list[Row]:
    """The largest set of trained rows whose total training FLOPs agree within `APART`.

    The total holds the trajectories that a row learns from. Such rows come from a sweep of methods
    under one budget. Runs take a whole number of steps, so their FLOPs differ a little. Fewer than
    `FEWEST` methods give an empty list.
    """
    flops = [_training_flops(row) for row in rows]
    rising = sorted(found for found in flops if found)

    def together(most: float) -> int:
        return bisect_right(rising, most) - bisect_left(rising, (1 - APART) * most)

    most = max(reversed(rising), key=together, default=0.0)
    group = [
        row
        for row, mine in zip(rows, flops, strict=True)
        if mine and (1 - APART) * most <= mine <= most
    ]
    return group if len({row.label for row in group}) >= FEWEST else []


def _training_flops(row: Row) -> float:
    """Total training FLOPs of a row's first finished run; 0 without training."""
    cost = row.finished[0].cost if row.finished and row.training[0] else None
    return cost.training.whole_flops if cost and cost.training else 0.0


def equal_compute_table(group: Sequence[Row], name: str) -> pd.DataFrame:
    """The headline metric by method, a column for each number of steps, and the bill.

    The best in any column comes first. A bill counts the store of trajectories once, and a student
    that serves several columns once.

    Args:
        group: rows of equal compute.
        name: the headline metric.
    """
    if not group:
        return pd.DataFrame()
    heading, digits = QUALITY[name]
    counts = sorted({row.num_steps for row in group})
    lines = []
    for named, found in by_setting(group).items():
        mine = {row.num_steps: row for row in found}
        first = found[0]
        best = min(row.interval(name).mean for row in mine.values())
        lines.append(
            (
                best,
                {
                    "method": named,
                    **{
                        f"{heading}, {counted(n)}": _cell(mine.get(n), name, digits) for n in counts
                    },
                    "seeds": _seeds([_finished_of_all(mine[n]) for n in counts if n in mine]),
                    **_bill(list(mine.values())),
                    "target": first.records[0].target,
                    "init": first.records[0].init,
                },
            )
        )
    return pd.DataFrame([line for _, line in sorted(lines, key=lambda found: found[0])])


def _bill(rows: Sequence[Row]) -> dict[str, str]:
    """Total FLOPs and seconds of the students that serve rows of one setting."""
    bills = [cost.training for row in rows if (cost := row.finished[0].cost) and cost.training]
    if trained_once(rows[0].records[0]):  # whichever of its numbers of steps trained it
        bills = bills[:1]
    store = max((bill.trajectory_flops for bill in bills), default=0.0)
    whole = store + sum(bill.student_flops for bill in bills)
    seconds = sum(bill.seconds + bill.inherited_seconds for bill in bills)
    return {
        "training TFLOPs for all its columns": f"{whole / 1e12:.3g}",
        "training seconds": f"{seconds:.0f}",
    }


def by_setting(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Groups rows of one label and batch size; each group has a unique name.

    A group holds one student for all numbers of steps, or one student for each. A row that was
    trained for longer than another of equal number of steps begins a new group.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    again = Counter[Any]()
    for row in sorted(rows, key=lambda row: (row.training, row.num_steps, -_noise_sets(row))):
        steps, batch = row.training
        setting = (
            row.label,
            batch,
            _noise_sets(row) if steps else None,
            steps if trained_once(row.records[0]) else None,
        )
        groups.setdefault((*setting, again[setting, row.num_steps]), []).append(row)
        again[setting, row.num_steps] += 1
    shared = Counter(label for label, *_ in groups)
    named = {}
    for (label, *_), mine in groups.items():
        mine.sort(key=lambda row: row.num_steps)
        trainings = dict.fromkeys(
            f"{steps} × {batch}" for steps, batch in (row.training for row in mine) if steps
        )
        sets = dict.fromkeys(counted(_noise_sets(row), "noise set") for row in mine)
        named[label if shared[label] == 1 else f"{label} ({', '.join([*trainings, *sets])})"] = mine
    return named


def _noise_sets(row: Row) -> int:
    return row.records[0].config["noise_sets"]


def trained_once(record: Record) -> bool:
    """Whether one student serves all numbers of steps."""
    if record.method not in METHODS.names():
        return False
    try:
        return METHODS[record.method].trained_once(METHODS[record.method].Config(**record.options))
    except ValidationError:  # options of another version
        return False


def _cell(row: Row | None, name: str, digits: int) -> str:
    return row.text(name, digits) if row else ""


def _finished_of_all(row: Row) -> str:
    """The number of finished seeds, with the number of all where some failed."""
    return str(len(row.finished)) + (
        f" of {len(row.records)}" if len(row.finished) < len(row.records) else ""
    )


def _seeds(numbers: Sequence[str]) -> str:
    """The number of seeds in each column, or once where all are equal."""
    return ", ".join(numbers if len(set(numbers)) > 1 else numbers[:1])


def at_images(points: Sequence[Milestone], name: str, images: float) -> float:
    """A curve at a number of images: linear between its points in the logarithms of both.

    Raises ValueError for images outside the curve.
    """
    for a, b in pairwise(points):
        if a.images <= images <= b.images:
            if min(a.quality[name], b.quality[name]) <= 0 or a.images == b.images:
                return b.quality[name]
            part = math.log(images / a.images) / math.log(b.images / a.images)
            return math.exp(
                (1 - part) * math.log(a.quality[name]) + part * math.log(b.quality[name])
            )
    raise ValueError(
        f"{images} images lie outside the curve, "
        f"which goes from {points[0].images} to {points[-1].images}"
    )


def _curve(record: Record, name: str) -> list[Milestone]:
    """The milestones at which a metric is finite."""
    return [
        point for point in record.milestones if math.isfinite(point.quality.get(name, math.nan))
    ]


def equal_images_table(group: Sequence[Row], name: str) -> pd.DataFrame:
    """Rows of equal compute after as many images as the shortest has seen, on noise set 0."""
    if not group:
        return pd.DataFrame()
    heading, digits = QUALITY[name]
    curves = {
        id(row): [points for record in row.finished if (points := _curve(record, name))]
        for row in group
    }
    images = min((points[-1].images for found in curves.values() for points in found), default=0)
    column, lines = f"{heading} after {images:,} images", []
    without: dict[tuple[str, str], list[str]] = {}
    for row in group:
        found = curves[id(row)]
        if row.diverged:
            without.setdefault((row.label, "a seed diverged"), []).append(str(row.num_steps))
        elif found and all(points[0].images <= images for points in found):
            here = t_interval([at_images(points, name, images) for points in found])
            line = {"method": row.label, "steps": str(row.num_steps), column: here.text(digits)}
            lines.append(
                (
                    row.num_steps,
                    here.mean,
                    {**line, "part of its run": f"{images / found[0][-1].images:.2f}"},
                )
            )
        else:
            reason = (
                "its curve begins later"
                if found
                else "its curve was taken at another number of steps"
            )
            without.setdefault((row.label, reason), []).append(str(row.num_steps))
    measured = [line for *_, line in sorted(lines, key=lambda line: line[:2])]
    rest = [
        {"method": label, "steps": ", ".join(at), column: f"not measured: {reason}"}
        for (label, reason), at in without.items()
    ]
    return pd.DataFrame([*measured, *rest]).fillna("")


def compared_with_best(group: Sequence[Row], name: str) -> list[Compared]:
    """Comparable rows of equal compute, each with the best of its number of steps as the second."""
    found, rows = [], comparable(group)
    for steps in sorted({row.num_steps for row in rows}):
        best, *others = sorted(
            (row for row in rows if row.num_steps == steps),
            key=lambda row: row.interval(name).mean,
        )
        found += [Compared.of(row, best, name) for row in others]
    return found


def against_best_table(compared: Sequence[Compared], name: str, largest_p: float) -> pd.DataFrame:
    """Rows of equal compute against the best of their number of steps.

    A row is shown not to be the best if it is worse and its p is small enough. The same numbers
    choose the best, so a truly best row may look worse than any of the others. It has one chance
    for each (Hsu 1984), and each stands in the family of tests.

    Args:
        compared: what `compared_with_best` gives.
        largest_p: the largest p that the page's correction rejects.
    """
    lines: list[dict[str, str]] = []
    best: Row | None = None
    for pair in compared:
        if pair.second is not best:
            best = pair.second
            lines.append({**_known_by(best), ABOVE: "the best"})
        found = pair.difference
        if not found:
            lines.append({**_known_by(pair.first), ABOVE: "fewer than two seeds in common"})
            continue
        shown = found.p_value <= largest_p and found.interval.mean > 0
        lines.append(
            {
                **_known_by(pair.first),
                ABOVE: found.interval.text(QUALITY[name][1]),
                "seeds × noise sets": f"{found.seeds} × {found.noise_sets}",
                "p": f"{found.p_value:.2g}",
                "not the best (Holm, 95 %)": "shown" if shown else "not shown",
            }
        )
    return pd.DataFrame(lines).fillna("")


def _known_by(row: Row) -> dict[str, str]:
    return {
        "steps": str(row.num_steps),
        "method": row.label,
        "training": f"{row.training[0]} × {row.training[1]}",
    }
