"""A/B timing of two callables in one run, and the machine's matrix rate.

The callables run in turn; the result is the median of their ratio with its interval.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats


@dataclass(frozen=True)
class Ratio:
    """The ratio of B's time to A's.

    Attributes:
        median: the median ratio of all pairs.
        low, high: the median's confidence interval from order statistics. It covers at least 95 %
            if there are 6 pairs or more.
        seconds: the median times of A and B.
        pairs: the number of pairs.
    """

    median: float
    low: float
    high: float
    seconds: tuple[float, float]
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def compare(a: Callable[[], Any], b: Callable[[], Any], pairs: int = 9, warmup: int = 1) -> Ratio:
    """Times A and B in turn, in the order A B B A, so that drift of the machine falls on both."""

    def seconds(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    for _ in range(warmup):
        a(), b()
    times = []
    for pair in range(pairs):
        order = (a, b) if pair % 2 == 0 else (b, a)
        found = {call: seconds(call) for call in order}
        times.append((found[a], found[b]))
    ratios = sorted(second / first for first, second in times)
    outside = max(int(stats.binom.ppf(0.025, pairs, 0.5)) - 1, 0)  # ratios dropped at each end
    first, second = (statistics.median(column) for column in zip(*times, strict=True))
    return Ratio(
        statistics.median(ratios), ratios[outside], ratios[-1 - outside], (first, second), pairs
    )


def matrix_rate(size: int = 1024, repeats: int = 15) -> float:
    """Multiply-adds a second of a float32 matrix product of that size: the best of several."""
    x, y = torch.rand(size, size), torch.rand(size, size)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        x @ y
        best = min(best, time.perf_counter() - start)
    return size**3 / best
