"""How well tasks agree on the order of methods at equal training FLOPs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import pandas as pd

from harness.methods import METHODS
from harness.report.compare import FEWEST
from harness.report.labels import defaults_of, in_label
from harness.report.pairs import off_task
from harness.report.rows import Row, headline
from harness.report.statistics import metric_interval


def known_as(row: Row, tuned: Mapping[str, Mapping[str, Any]]) -> str:
    """A key that finds a row on another task.

    It holds the method, steps and options off the task's defaults, but not the options that every
    label names: they suit one network, such as its depth.
    """
    method = row.records[0].method
    fields = METHODS[method].Config.model_fields if method in METHODS.names() else {}
    own = {
        name: value
        for name, value in off_task(row, tuned).items()
        if name not in fields or not in_label(fields[name])
    }
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
            values = [
                [
                    metric_interval(rows[key].finished, headline(list(rows.values()))).mean
                    for key in keys
                ]
                for rows in known
            ]
            correlation, p = rank_correlation(*values)
            lines.append(
                {
                    "tasks": f"{one} and {other}",
                    "steps": str(steps),
                    "methods": str(len(keys)),
                    "rank correlation": f"{correlation:.2f}",
                    "p": f"{p:.2g}",
                }
            )
    return pd.DataFrame(lines)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Spearman's rank correlation and its two-sided p-value by permutation.

    All orders of up to 7 numbers count, and 9,999 random ones of more. The usual p-value, from a t
    distribution, is 0 for a correlation of 1 of any length.
    """
    from scipy import stats  # here, because it takes a second to import

    x, y = stats.rankdata(one), stats.rankdata(other)
    found = stats.permutation_test(
        (x,),
        lambda x, axis=-1: (x * (y - y.mean())).sum(axis),
        permutation_type="pairings",
        n_resamples=9999,
        vectorized=True,
        random_state=0,
    )
    return float(stats.spearmanr(one, other).statistic), float(found.pvalue)
