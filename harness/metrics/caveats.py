"""When a metric's number must not be compared, in one sentence each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from harness.metrics import METRICS
from harness.records import Metric

OUTGROWN = 100
"""Size, relative to the teacher's, above which samples count as outgrown."""
COLLAPSED = 0.25
"""Spread, relative to the teacher's, below which samples count as collapsed."""
LOOKED_AT = 2**26
"""Numbers of the samples in which a collapse is looked for: of all small ones, 341 of 256 px."""


def collapse(samples: Tensor, teacher: Tensor, numbers: Tensor) -> str:
    """A warning where samples of one condition differ far less than the teacher's do, or "".

    Args:
        samples, teacher: from the same noise, [n, C, H, W].
        numbers: the numbers of their conditions, [n].
    """
    first = slice(max(2, LOOKED_AT // samples[0].numel()))
    mine, theirs = (spread(x[first], numbers[first]) for x in (samples, teacher))
    if mine >= COLLAPSED * theirs:
        return ""
    return (
        f"collapsed: samples of one condition differ {mine / theirs:.2g} times as much "
        "as the teacher's"
    )


def outgrown(samples: Tensor, teacher: Tensor) -> str:
    """A warning where samples are far larger than the teacher's, or "".

    Rounding to 8 bits clips them, so metrics of images do not see how far a training ran away.

    Args:
        samples, teacher: [n, C, H, W].
    """
    mine, theirs = (float(x.double().square().mean().sqrt()) for x in (samples, teacher))
    if not theirs or mine <= OUTGROWN * theirs:
        return ""
    return f"outgrown: samples are {mine / theirs:.2g} times as large as the teacher's"


def spread(samples: Tensor, numbers: Tensor) -> float:
    """Root mean squared distance of samples [n, C, H, W] from the mean of their condition.

    A condition with one sample says nothing; where all have one, the mean is that of all.
    """
    _, group, counts = numbers.unique(return_inverse=True, return_counts=True)
    if int(counts.max()) == 1:
        group, counts = torch.zeros_like(group), counts.sum().reshape(1)
    flat = samples.flatten(1).double()
    means = torch.zeros(len(counts), flat.shape[1], dtype=torch.float64)
    means = means.index_add(0, group, flat) / counts.unsqueeze(1)
    several = (counts > 1)[group]
    return float((flat - means[group])[several].square().mean().sqrt())


def singular_covariance(metric: str, width: int, counts: Mapping[str, int]) -> str:
    """A warning where a Frechet distance has fewer images than its features have numbers.

    The covariance of n vectors has rank n - 1 at most. Below full rank the distance measures n more
    than it measures the images.

    Args:
        metric: the distance's name.
        width: numbers in a feature vector.
        counts: numbers of images by what they are, e.g. "samples".

    Returns:
        A sentence without its full stop, or "" where every set is larger than `width`.
    """
    few = [f"{count:,} {what}" for what, count in counts.items() if count <= width]
    if not few:
        return ""
    return (
        f"{metric} has {width:,} features but {' and '.join(few)}: "
        "the covariance is singular, so the number means little"
    )


def floor_of_other_size(metrics: Mapping[str, Metric], name: str) -> str:
    """A warning where a metric's floor rests on fewer images than its samples, or ""."""
    floor, samples, beside = metrics.get(f"{name}_floor"), metrics[name], f"{name}_at_floor_n"
    if floor is None or floor.n == samples.n:
        return ""
    sizes = f"the floor is at N = {floor.n:,}, samples are at N = {samples.n:,}: not comparable"
    pair = f"; compare the floor with {plain_heading(beside)}" if beside in metrics else ""
    return f"{plain_heading(name)} of {sizes}{pair}."


def plain_heading(name: str) -> str:
    """A metric's heading without its arrow."""
    return METRICS[name].heading.rstrip(" ↓↑")
