"""Means, intervals and paired differences of records: pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from scipy import special

from harness.records import Record


@dataclass(frozen=True)
class Interval:
    """A mean and the half width of its 95 % t interval; NaN for a single value."""

    mean: float
    half_width: float

    def text(self, digits: int) -> str:
        """Such as "12.34 ± 0.56", or the mean alone."""
        mean = f"{self.mean:.{digits}f}"
        return mean if math.isnan(self.half_width) else f"{mean} ± {self.half_width:.{digits}f}"


def t_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % t interval of independent values."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return Interval(mean, math.nan)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return Interval(mean, _quantile(n - 1) * deviation / math.sqrt(n))


@cache
def _quantile(freedom: int) -> float:
    """The 97.5 % quantile of the t distribution."""
    return float(special.stdtrit(freedom, 0.975))


def metric_interval(records: Sequence[Record], name: str) -> Interval:
    """A metric over training seeds, or over noise sets for a row without training."""
    if not records[0].config["total_steps"]:
        return t_interval(list(records[0].metrics[name].values.values()))
    return t_interval([record.metrics[name].mean for record in records])


@dataclass(frozen=True)
class Difference:
    """A metric of one row minus that of another, paired within training seed and noise set.

    Attributes:
        interval: mean and 95 % t interval over seeds.
        p_value: two-sided, of a paired t test over seeds.
        seeds: number of pairs.
    """

    interval: Interval
    p_value: float
    seeds: int


def paired_difference(first: Sequence[Record], second: Sequence[Record], name: str) -> Difference | None:
    """first - second over shared seeds; None with fewer than two of them."""
    by_seed = [{record.config["seed"]: record.metrics[name].values for record in row} for row in (first, second)]
    pairs = []
    for seed in sorted(by_seed[0].keys() & by_seed[1].keys()):
        a, b = by_seed[0][seed], by_seed[1][seed]
        shared = a.keys() & b.keys()
        if shared:
            pairs.append(sum(a[k] - b[k] for k in shared) / len(shared))
    if len(pairs) < 2:
        return None
    return Difference(t_interval(pairs), _p_value(pairs), len(pairs))


def _p_value(values: Sequence[float]) -> float:
    """Two-sided, of a t test that the mean of independent values is 0."""
    n, mean = len(values), sum(values) / len(values)
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * special.stdtr(n - 1, -abs(mean) / error))


def degradation_ratio(first: Sequence[Record], second: Sequence[Record], reference: Record, name: str) -> Interval | None:
    """One row's excess over the reference, divided by another's, paired in seed and noise set.

    Returns the mean and 95 % t interval over shared seeds; None if a row does not exceed the
    reference or has noise sets that the reference lacks.
    """
    excesses, beside = [], reference.metrics[name].values
    for row in (first, second):
        sets = {record.config["seed"]: record.metrics[name].values for record in row}
        if any(values.keys() - beside.keys() for values in sets.values()):
            return None
        excesses.append({seed: sum(v - beside[k] for k, v in values.items()) / len(values) for seed, values in sets.items()})
    seeds = sorted(excesses[0].keys() & excesses[1].keys())
    if not seeds or min(min(excess[seed] for seed in seeds) for excess in excesses) <= 0:
        return None
    return t_interval([excesses[0][seed] / excesses[1][seed] for seed in seeds])


def holm(p_values: Sequence[float], level: float = 0.05, unseen: int = 0) -> list[bool]:
    """Which hypotheses Holm's step-down procedure rejects at a family-wise level (Holm 1979).

    Args:
        unseen: further hypotheses of the family, whose p is taken to be 1.
    """
    rejected = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] > level / (len(p_values) + unseen - rank):
            break
        rejected[index] = True
    return rejected
