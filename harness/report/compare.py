"""Methods at equal training FLOPs or images, and how well tasks agree on their order."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

import pandas as pd
from pydantic import ValidationError

from harness.methods import METHODS
from harness.records import Milestone, Record
from harness.report.labels import counted, defaults_of, in_label
from harness.report.pairs import off_task
from harness.report.rows import Row, headline
from harness.report.statistics import metric_interval, paired_difference, t_interval
from harness.report.tables import QUALITY

FEWEST = 5
"""Methods that a comparison at equal cost needs."""
APART = 0.02
"""Largest relative difference of training FLOPs that count as equal."""
ABOVE = "above the best"
"""The column of differences."""


def equal_compute(rows: Sequence[Row]) -> list[Row]:
    """The largest set of trained rows whose training FLOPs agree within `APART`.

    It is a sweep of methods under one budget, which a whole number of steps does not quite use up.
    It is empty for fewer than `FEWEST` methods.
    """
    flops = [_training_flops(row) for row in rows]
    groups = [
        [row for row, mine in zip(rows, flops, strict=True) if (1 - APART) * most <= mine <= most]
        for most in sorted(set(flops) - {0.0}, reverse=True)
    ]
    group = max(groups, key=len, default=[])
    return group if len({row.label for row in group}) >= FEWEST else []


def _training_flops(row: Row) -> float:
    """Training FLOPs of a row's first finished run; 0 without training."""
    cost = row.finished[0].cost if row.finished and row.training[0] else None
    return cost.training.student_flops if cost and cost.training else 0.0


def equal_compute_table(group: Sequence[Row], name: str) -> pd.DataFrame:
    """The headline metric by method, a column for each number of steps.

    The best in any column comes first.

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
        bills = [row.finished[0].cost.training for row in mine.values() if row.finished[0].cost]
        if trained_once(first.records[0]):  # whichever of its numbers of steps trained it
            bills = bills[:1]
        whole = sum(bill.whole_flops for bill in bills if bill)
        best = min(metric_interval(row.finished, name).mean for row in mine.values())
        lines.append((best, {
            "method": named, **{f"{heading}, {counted(n)}": _cell(mine.get(n), name, digits) for n in counts},
            "seeds": _seeds([_finished_of_all(mine[n]) for n in counts if n in mine]),
            "training TFLOPs for all its columns": f"{whole / 1e12:.3g}",
            "target": first.records[0].target, "init": first.records[0].init,
        }))  # fmt: skip
    return pd.DataFrame([line for _, line in sorted(lines, key=lambda found: found[0])])


def by_setting(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Groups rows of one label and batch size, by a name that is theirs alone.

    A group is one student for all numbers of steps, or one for each. A row with a number of steps
    that its group has already, trained for longer, begins another group.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.training, row.num_steps, -_noise_sets(row))):
        steps, batch = row.training
        setting = (row.label, batch, _noise_sets(row) if steps else None, steps if trained_once(row.records[0]) else None)
        again = sum(row.num_steps == other.num_steps for key, mine in groups.items() if key[:-1] == setting for other in mine)
        groups.setdefault((*setting, again), []).append(row)
    shared = Counter(label for label, *_ in groups)
    named = {}
    for (label, *_), mine in groups.items():
        mine.sort(key=lambda row: row.num_steps)
        trainings = dict.fromkeys(f"{steps} × {batch}" for steps, batch in (row.training for row in mine) if steps)
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
    return metric_interval(row.finished, name).text(digits) if row else ""


def _finished_of_all(row: Row) -> str:
    """The number of finished seeds, with the number of all where some failed."""
    return str(len(row.finished)) + (f" of {len(row.records)}" if len(row.finished) < len(row.records) else "")


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
            return math.exp((1 - part) * math.log(a.quality[name]) + part * math.log(b.quality[name]))
    raise ValueError(f"{images} images lie outside the curve, which goes from {points[0].images} to {points[-1].images}")


def equal_images_table(group: Sequence[Row], name: str) -> pd.DataFrame:
    """Rows of equal compute after as many images as the shortest has seen, on noise set 0."""
    if not group:
        return pd.DataFrame()
    heading, digits = QUALITY[name]
    curves = {id(row): [record.milestones for record in row.finished if record.milestones] for row in group}
    images = min((points[-1].images for found in curves.values() for points in found), default=0)
    column, lines = f"{heading} after {images:,} images", []
    without: dict[tuple[str, str], list[str]] = {}
    for row in group:
        found = curves[id(row)]
        if found and found[0][0].images <= images:
            here = t_interval([at_images(points, name, images) for points in found])
            line = {"method": row.shown, "steps": str(row.num_steps), column: here.text(digits)}
            lines.append((row.num_steps, here.mean, {**line, "part of its run": f"{images / found[0][-1].images:.2f}"}))
        else:
            reason = "its curve begins later" if found else "its curve was taken at another number of steps"
            without.setdefault((row.shown, reason), []).append(str(row.num_steps))
    measured = [line for *_, line in sorted(lines, key=lambda line: line[:2])]
    rest = [{"method": label, "steps": ", ".join(at), column: f"not measured: {reason}"} for (label, reason), at in without.items()]
    return pd.DataFrame([*measured, *rest]).fillna("")


def against_best_table(group: Sequence[Row], name: str) -> pd.DataFrame:
    """Rows of equal compute with two seeds or more against the best of their number of steps.

    Differences are paired within seed and noise set. p is a two-sided paired t test's times the
    number of the other rows; it assumes normal seeds. Below 0.05 a row is shown not to be the best.
    The truly best row is called so in fewer than one case in 20, although the same numbers choose
    the best: each other row had one chance to look better (Hsu 1984, by Bonferroni).
    """
    group, lines = [row for row in group if len(row.finished) > 1], []
    for steps in sorted({row.num_steps for row in group}):
        best, *others = sorted((row for row in group if row.num_steps == steps), key=lambda row: metric_interval(row.finished, name).mean)
        if not others:
            continue
        lines.append({**_known_by(best), ABOVE: "the best"})
        for row in others:
            found = paired_difference(row.finished, best.finished, name)
            if not found:
                lines.append({**_known_by(row), ABOVE: "fewer than two seeds in common"})
                continue
            p = min(1, found.p_value * len(others))
            shown = p < 0.05 and found.interval.mean > 0
            lines.append({
                **_known_by(row), ABOVE: found.interval.text(QUALITY[name][1]), "seeds": str(found.seeds), "p, corrected": f"{p:.2g}",
                "not the best (95 %)": "shown" if shown else "not shown",
            })  # fmt: skip
    return pd.DataFrame(lines).fillna("")


def _known_by(row: Row) -> dict[str, str]:
    return {"steps": str(row.num_steps), "method": row.shown, "training": f"{row.training[0]} × {row.training[1]}"}


def known_as(row: Row, tuned: Mapping[str, Mapping[str, Any]]) -> str:
    """A key that finds a row on another task.

    It holds the method, steps and options off the task's defaults, but not the options that every
    label names: they suit one network, such as its depth.
    """
    method = row.records[0].method
    fields = METHODS[method].Config.model_fields if method in METHODS.names() else {}
    own = {name: value for name, value in off_task(row, tuned).items() if name not in fields or not in_label(fields[name])}
    return json.dumps([method, row.num_steps, own], sort_keys=True)


def agreement_table(by_task: Mapping[str, Sequence[Row]]) -> pd.DataFrame:
    """Spearman's rank correlation of tasks' headline metrics, by number of steps.

    Args:
        by_task: each task's rows of equal compute.
    """
    lines, known_rows = [], {}
    for task, group in by_task.items():
        tuned = defaults_of(task)
        # The plainest row comes last, so that it counts among rows of equal keys.
        farthest_first = sorted(group, key=lambda row: -len(off_task(row, tuned)))
        known_rows[task] = {known_as(row, tuned): row for row in farthest_first}
    for one, other in combinations(by_task, 2):
        known = [known_rows[one], known_rows[other]]
        shared = [key for key in known[0] if key in known[1]]
        for steps in sorted({known[0][key].num_steps for key in shared}):
            keys = [key for key in shared if known[0][key].num_steps == steps]
            if len(keys) < FEWEST:
                continue
            values = [[metric_interval(rows[key].finished, headline(list(rows.values()))).mean for key in keys] for rows in known]
            correlation, p = rank_correlation(*values)
            lines.append({"tasks": f"{one} and {other}", "steps": str(steps), "methods": str(len(keys)),
                          "rank correlation": f"{correlation:.2f}", "p": f"{p:.2g}"})  # fmt: skip
    return pd.DataFrame(lines)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Spearman's rank correlation and its two-sided p-value by permutation.

    All orders of up to 7 numbers count, and 9,999 random ones of more. The usual p-value, from a t
    distribution, is 0 for a correlation of 1 of any length.
    """
    from scipy import stats  # here: it takes a second to import

    x, y = stats.rankdata(one), stats.rankdata(other)
    found = stats.permutation_test(
        (x,), lambda x, axis=-1: (x * (y - y.mean())).sum(axis), permutation_type="pairings", n_resamples=9999, vectorized=True,
        random_state=0,
    )  # fmt: skip
    return float(stats.spearmanr(one, other).statistic), float(found.pvalue)
