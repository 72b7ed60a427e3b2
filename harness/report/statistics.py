"""Means, intervals and paired differences of records: pure functions.

A metric of a trained row is a matrix [seed, noise set]. Both sides are random factors, and they
are crossed: each seed's student meets the same noise sets. So its mean has the variance

    (MS_seed + MS_noise - MS_rest) / (S K)

from the mean squares of the two-way layout without replication, never below MS_rest / (S K). Its
degrees of freedom are Satterthwaite's (1946, "An Approximate Distribution of Estimates of Variance
Components", Biometrics 2), and its interval is that of Student's t. A sum of mean squares never has
fewer degrees of freedom than its poorest term, so neither has this one in spite of its minus.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from harness.records import Record

Values = NDArray[np.float64]


def number(value: float, form: str) -> str:
    """A number as text, by a format such as ".2f"; words for NaN and for what is infinite."""
    return format(value, form) if math.isfinite(value) else "not finite"


@dataclass(frozen=True)
class Interval:
    """A mean and the half width of its 95 % t interval; NaN for a single value."""

    mean: float
    half_width: float

    def text(self, digits: int) -> str:
        """Such as "12.34 ± 0.56", or the mean alone."""
        mean = number(self.mean, f".{digits}f")
        if math.isnan(self.half_width) or not math.isfinite(self.mean):
            return mean
        return f"{mean} ± {number(self.half_width, f'.{digits}f')}"


def t_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % t interval of independent values."""
    return crossed_interval(np.asarray(values, float)[:, None])


def crossed_interval(values: Values) -> Interval:
    """Mean and 95 % t interval of a matrix [seed, noise set] of two crossed random factors.

    A matrix of one row or one column gives the t interval over the other factor.
    """
    error, freedom = standard_error(values)
    quantile = float(special.stdtrit(freedom, 0.975))
    return Interval(float(values.mean()), quantile * error)


def standard_error(values: Values) -> tuple[float, float]:
    """The standard error of a matrix's mean and its degrees of freedom; NaN for a single value."""
    (seeds, sets), size = values.shape, values.size
    if size == 1:
        return math.nan, 0
    # A page has 10^5 matrices of a few numbers, for which plain Python is faster than NumPy.
    rows: list[list[float]] = values.tolist()
    mean = sum(map(sum, rows)) / size
    if 1 in (seeds, sets):
        squares_of_all = _squares(x - mean for row in rows for x in row)
        return math.sqrt(squares_of_all / (size - 1) / size), size - 1
    by_seed = [sum(row) / sets - mean for row in rows]
    by_set = [sum(column) / seeds - mean for column in zip(*rows, strict=True)]
    rest_of = (
        x - seed - of_set - mean
        for row, seed in zip(rows, by_seed, strict=True)
        for x, of_set in zip(row, by_set, strict=True)
    )
    free = (seeds - 1, sets - 1, (seeds - 1) * (sets - 1))
    sums = (sets * _squares(by_seed), seeds * _squares(by_set), _squares(rest_of))
    of_seed, of_set, rest = squares = [x / of for x, of in zip(sums, free, strict=True)]
    whole = of_seed + of_set - rest
    if whole <= rest:
        return math.sqrt(rest / size), free[2]
    freedom = whole * whole / sum(x * x / of for x, of in zip(squares, free, strict=True))
    return math.sqrt(whole / size), max(freedom, min(free))


def _squares(values: Iterable[float]) -> float:
    return sum(x * x for x in values)


def matrix_of(records: Sequence[Record], name: str) -> Values:
    """A metric [seed, noise set] on the noise sets that all records have; a record is a seed."""
    values = [record.metrics[name].values for record in records]
    shared = sorted(set.intersection(*map(set, values)))
    return np.array([[of[number] for number in shared] for of in values], float)


def metric_interval(records: Sequence[Record], name: str) -> Interval:
    """A metric over training seeds crossed with noise sets, or over noise sets without training.

    One trained seed gives the mean alone, since noise sets say nothing of another training.
    """
    values = matrix_of(records, name)
    if records[0].config["total_steps"] and len(records) == 1:
        return Interval(float(values.mean()), math.nan)
    return crossed_interval(values)


@dataclass(frozen=True)
class Difference:
    """A metric of one row minus that of another, paired within training seed and noise set.

    Attributes:
        interval: mean and 95 % t interval over seeds crossed with noise sets.
        p_value: two-sided, of the same t.
        seeds, noise_sets: the pairs' numbers of both.
    """

    interval: Interval
    p_value: float
    seeds: int
    noise_sets: int


def paired_difference(
    first: Sequence[Record], second: Sequence[Record], name: str
) -> Difference | None:
    """first - second over shared seeds and noise sets; None with fewer than two shared seeds."""
    ones, others = _shared_seeds(first, second)
    if len(ones) < 2:
        return None
    values = matrix_of([*ones, *others], name)
    seeds, sets = len(ones), values.shape[1]
    if not sets:
        return None
    differences = values[:seeds] - values[seeds:]
    return Difference(crossed_interval(differences), p_value(differences), seeds, sets)


def _shared_seeds(
    first: Sequence[Record], second: Sequence[Record]
) -> tuple[list[Record], list[Record]]:
    """The records of two rows' shared seeds, in the order of the seeds."""
    one, other = ({record.config["seed"]: record for record in row} for row in (first, second))
    seeds = sorted(one.keys() & other.keys())
    return [one[seed] for seed in seeds], [other[seed] for seed in seeds]


def p_value(values: Values) -> float:
    """Two-sided, of a t test that the mean of a matrix of two crossed random factors is 0."""
    mean, (error, freedom) = float(values.mean()), standard_error(values)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * special.stdtr(freedom, -abs(mean) / error))


def degradation_ratio(
    first: Sequence[Record], second: Sequence[Record], reference: Record, name: str
) -> Interval | None:
    """One row's mean excess over the reference, divided by another's, on what all three share.

    The interval is by the delta method: r = mean(a) / mean(b) of two excesses has the error of the
    mean of (a - r b) / mean(b), which is a matrix [seed, noise set] like any other. One seed gives
    the ratio alone. None if a row does not exceed the reference in each seed, or nothing is shared.
    """
    ones, others = _shared_seeds(first, second)
    values = matrix_of([*ones, *others, reference], name)
    a, b = values[: len(ones)] - values[-1], values[len(ones) : -1] - values[-1]
    if not a.size or min(a.mean(1).min(), b.mean(1).min()) <= 0:
        return None
    ratio = float(a.mean() / b.mean())
    if len(ones) == 1:
        return Interval(ratio, math.nan)
    return Interval(ratio, crossed_interval((a - ratio * b) / b.mean()).half_width)


def holm(p_values: Sequence[float], level: float = 0.05, unseen: int = 0) -> float:
    """The p up to which Holm's step-down procedure rejects at a family-wise level (Holm 1979).

    Args:
        unseen: further hypotheses of the family, whose p is taken to be 1.

    Returns:
        The largest p that is rejected; 0 if none is.
    """
    largest = 0.0
    for rank, p in enumerate(sorted(p_values)):
        if p > level / (len(p_values) + unseen - rank):
            break
        largest = p
    return largest
