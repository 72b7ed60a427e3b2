"""How well tasks agree on the order of methods at equal training FLOPs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import pandas as pd

from harness.methods import METHODS
from harness.report.compare import FEWEST
from harness.report.labels import in_label
from harness.report.rows import Row, headline


def known_as(row: Row) -> str:
    """A key that finds a row on another task.

    It holds the method, steps and options off the task's defaults, but not the options that every
    label names: they suit one network, such as its depth.
    """
    method = row.records[0].method
    fields = METHODS[method].Config.model_fields if method in METHODS.names() else {}
    own = {
        name: value
        for name, value in row.off_task.items()
        if name not in fields or not in_label(fields[name])
    }
    return json.dumps([method, row.num_steps, own], sort_keys=True)


def agreement_table(by_task: Mapping[str, Sequence[Row]]) -> pd.DataFrame:
    """Spearman's rank correlation of tasks' headline metrics, by number of steps.

    It has no p: the rows are chosen by hand, so they are no sample of methods.

    Args:
        by_task: each task's rows of equal compute.
    """
    lines, known_rows = [], {}
    for task, group in by_task.items():
        # The plainest row comes last, so that it counts among rows of equal keys.
        farthest_first = sorted(group, key=lambda row: -len(row.off_task))
        known_rows[task] = {known_as(row): row for row in farthest_first if not row.diverged}
    for one, other in combinations(by_task, 2):
        known = [known_rows[one], known_rows[other]]
        shared = [key for key in known[0] if key in known[1]]
        for steps in sorted({known[0][key].num_steps for key in shared}):
            keys = [key for key in shared if known[0][key].num_steps == steps]
            if len(keys) < FEWEST:
                continue
            values = [
                [rows[key].interval(headline(list(rows.values()))).mean for key in keys]
                for rows in known
            ]
            lines.append(
                {
                    "tasks": f"{one} and {other}",
                    "steps": str(steps),
                    "methods": str(len(keys)),
                    "rank correlation": "undefined: all are equal on one"
                    if math.isnan(found := rank_correlation(*values))
                    else f"{found:.2f}",
                }
            )
    return pd.DataFrame(lines)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation of two lists of equal length; NaN where all of one are equal."""
    from scipy import stats  # here, because it takes a second to import

    if 1 in (len(set(one)), len(set(other))):
        return math.nan
    return float(stats.spearmanr(one, other).statistic)
