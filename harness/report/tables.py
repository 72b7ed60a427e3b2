"""Tables of a task's rows; all cells are text."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from harness.metrics import METRICS
from harness.records import Record
from harness.report.apart import training_of
from harness.report.pairs import Compared
from harness.report.rows import Row, trains
from harness.report.statistics import (
    Difference,
    degradation_ratio,
    number,
    t_interval,
)
from harness.runs.external import stated_bill

_QUALITY = (
    "fid",
    "sfid",
    "inception_score",
    "kid",
    "label_agreement",
    "prompts_followed",
    "followed_seen",
    "followed_held_out",
    "fid_inception",
    "fid_clean",
    "fd_dinov2",
    "frechet_distance",
    "kl",
    "map_error",
    "distance_to_teacher",
)
QUALITY = {name: (METRICS[name].heading, METRICS[name].digits) for name in _QUALITY}
"""Heading and digits of the metrics of quality."""
_APART = ("solver_error",)
"""Metrics that only `error_split_table` shows."""


def plain_heading(name: str) -> str:
    """A headline metric's heading without its arrow."""
    return QUALITY[name][0].rstrip(" ↓↑")


def diversity() -> dict[str, tuple[str, int]]:
    """Heading and digits of every other registered metric, those of plug-ins last."""
    first = (
        "precision",
        "recall",
        "density",
        "coverage",
        "inception_style_score",
        "class_diversity",
        "memorised_share",
    )
    names = [
        *first,
        *(name for name in METRICS.names() if name not in (*first, *_QUALITY, *_APART)),
    ]
    return {name: (METRICS[name].heading, METRICS[name].digits) for name in names}


KEYS = ["method", "steps", "training", "seeds × noise sets"]


def results_table(rows: Sequence[Row]) -> pd.DataFrame:
    """One line a row: quality with 95 % intervals, and cost."""
    return pd.DataFrame([_line(row) for row in rows]).fillna("")


def _line(row: Row) -> dict[str, str]:
    if not row.finished:
        return {**_keys(row), "status": f"failed: {row.records[0].reason}"}
    return {**_keys(row), **_quality(row), **_cost(row)}


def _keys(row: Row) -> dict[str, str]:
    steps, first = row.training[0], row.records[0]
    untrained = not steps and trains(first) and not stated_bill(first)
    seeds = len(row.finished) if steps else "-"
    return {
        "method": row.label,
        "steps": str(row.num_steps),
        "training": "untrained" if untrained else training_of(first),
        "seeds × noise sets": f"{seeds} × {first.config['noise_sets']}",
    }


def _short_keys(row: Row) -> dict[str, str]:
    keys = _keys(row)
    return {key: keys[key] for key in KEYS[:3]}


def _quality(row: Row) -> dict[str, str]:
    return {
        heading: row.text(name, digits)
        for name, (heading, digits) in {**QUALITY, **diversity()}.items()
        if all(name in record.metrics for record in row.finished)
    }


def _cost(row: Row) -> dict[str, str]:
    costs, line = [record.cost for record in row.finished if record.cost], {}
    if costs:
        line["NFE"] = f"{costs[0].nfe:g}"
        line["MMACs / sample"] = f"{costs[0].macs_per_sample / 1e6:.1f}"
        line["parameters"] = f"{costs[0].parameters / 1e6:.3f} M"
    ratios = [cost.latency.ratio for cost in costs if cost.latency]
    line["latency / teacher"] = number(t_interval(ratios).mean, ".3f") if ratios else ""
    bills = [cost.training for cost in costs if cost.training]
    if bills:
        line["training TFLOPs + trajectories"] = (
            f"{bills[0].student_flops / 1e12:.1f} + {bills[0].trajectory_flops / 1e12:.1f}"
        )
        line["training seconds"] = (
            f"{t_interval([bill.seconds + bill.inherited_seconds for bill in bills]).mean:.0f}"
        )
    return line


def floor_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Held-out real samples against the same reference, apart because FID depends on N."""
    metrics = {
        name: metric
        for row in rows
        for record in row.finished
        for name, metric in record.metrics.items()
    }
    floors = {name: metric for name, metric in metrics.items() if name.endswith("_floor")}
    if not floors:
        return pd.DataFrame()
    line = {"held-out real samples": f"N = {next(iter(floors.values())).n}"}
    for name, (heading, digits) in {**QUALITY, **diversity()}.items():
        if f"{name}_floor" in floors:
            line[heading] = number(floors[f"{name}_floor"].mean, f".{digits}f")
    return pd.DataFrame([line])


def exposure_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Error after the last step on the teacher's history and on the own, with their gaps."""
    lines = []
    for row in rows:
        exposures = [record.exposure for record in row.finished if record.exposure]
        if not exposures or not row.training[0] or row.diverged:
            continue
        gaps = [
            [
                own - taught
                for own, taught in zip(e.on_own_history, e.on_teachers_history, strict=True)
            ]
            for e in exposures
        ]
        lines.append(
            {
                **_short_keys(row),
                "last step, teacher's history": t_interval(
                    [e.on_teachers_history[-1] for e in exposures]
                ).text(4),
                "last step, own history": t_interval(
                    [e.on_own_history[-1] for e in exposures]
                ).text(4),
                "gap after each step": ", ".join(
                    number(sum(step) / len(step), ".4f") for step in zip(*gaps, strict=True)
                ),
            }
        )
    return pd.DataFrame(lines)


def error_split_table(rows: Sequence[Row]) -> pd.DataFrame:
    """The parts of the error of the ODE map, as root mean squares that do not add up."""
    lines = []
    for row in rows:
        if not row.finished or row.diverged or "map_error" not in row.finished[0].metrics:
            continue
        exposures = [
            record.exposure for record in row.finished if record.exposure and record.exposure.drift
        ]
        line = {
            **_short_keys(row),
            "whole": row.text("map_error", 4),
            "solver: the teacher's trajectories": row.text("solver_error", 4),
        }
        if exposures:
            line["approximation: on the teacher's history"] = t_interval(
                [e.on_teachers_history[-1] for e in exposures]
            ).text(4)
            line["exposure: from there to its own history"] = t_interval(
                [e.drift[-1] for e in exposures]
            ).text(4)
        lines.append(line)
    return pd.DataFrame(lines).fillna("")


def differences_table(
    compared: Sequence[Compared], name: str, largest_p: float, reference: Record | None
) -> pd.DataFrame:
    """Pairs of rows that differ in one thing, paired within seed and noise set.

    Args:
        compared: what `compared_neighbours` gives.
        name: the headline metric.
        largest_p: the largest p that the page's correction rejects.
        reference: the teacher's own output.
    """
    lines = [
        _difference_line(pair.first, pair.second, pair.difference, name, largest_p, reference)
        for pair in compared
        if pair.difference
    ]
    return pd.DataFrame(lines)


def _difference_line(
    a: Row, b: Row, difference: Difference, name: str, largest_p: float, reference: Record | None
) -> dict[str, str]:
    lower = a.label if difference.interval.mean < 0 else b.label
    ratio = degradation_ratio(a.finished, b.finished, reference, name) if reference else None
    return {
        "first": a.label,
        "second": b.label,
        "steps": str(a.num_steps),
        "training": f"{a.training[0]} × {a.training[1]}",
        "seeds × noise sets": f"{difference.seeds} × {difference.noise_sets}",
        f"{plain_heading(name)} first − second": difference.interval.text(QUALITY[name][1]),
        "p": f"{difference.p_value:.3g}",
        "better (Holm, 95 %)": lower if difference.p_value <= largest_p else "not shown",
        "over the teacher's, first / second": ratio.text(3) if ratio else "",
    }
