"""Fidelity and diversity apart, and memorisation.

Nearest-neighbour metrics in feature space, the inception-style score, and copies in pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness.data.readers import Images

Distances = Callable[[Tensor, Tensor], Tensor]
"""A function from [n, d] and [m, d] to distances [n, m], or to anything that rises with them."""

MANIFOLD_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
"""The k-th nearest other vector that bounds a neighbourhood; a set of k vectors has none."""
AT_ONCE = 500
"""Rows of a distance matrix that are computed at once; larger parts take longer to allocate."""
IMAGES_AT_ONCE = 2_000
"""Images from files that are in memory at once."""
CANDIDATES = 8
"""Nearest images in single precision whose distances are then computed in double precision."""


def half_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances in float16, as ADM's evaluator rounds them: float32 [n, m].

    Dhariwal and Nichol 2021, arXiv 2105.05233: `|a|^2 - 2 a b + |b|^2`, each term and sum rounded
    to float16. Sums of products are taken in float32 here, as GPUs do. A block that is not finite
    is computed in float32.
    """
    u, v = a.half().float(), b.half().float()
    norm_u, norm_v = (x.square().half().float().sum(1).half() for x in (u, v))
    inner = (u @ v.t()).half()
    squared = (norm_u.unsqueeze(1) - 2 * inner + norm_v).clamp(min=0)
    if bool(squared.isfinite().all()):
        return squared.float()
    a, b = a.float(), b.float()
    inner = a @ b.t()
    return (a.square().sum(1, keepdim=True) - 2 * inner + b.square().sum(1)).clamp(min=0)


def radii(features: Tensor, k: int, distances: Distances = torch.cdist) -> Tensor:
    """Distance of each feature vector [n, d] to its k-th nearest other one: [n]."""
    return torch.cat(
        [
            distances(part, features).topk(k + 1, largest=False).values[:, k]
            for part in features.split(AT_ONCE)
        ]
    )


def precision_recall(
    generated: Tensor,
    real: Tensor,
    k: int = MANIFOLD_NEIGHBOURS,
    distances: Distances = torch.cdist,
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1 to 3).

    Args:
        generated, real: features, [n, d] and [m, d].
        k: the k-th nearest other feature vector bounds a neighbourhood.
        distances: how far two vectors are apart.
    """
    return (
        _inside(generated, real, radii(real, k, distances), distances),
        _inside(real, generated, radii(generated, k, distances), distances),
    )


def _inside(points: Tensor, centres: Tensor, radius: Tensor, distances: Distances) -> float:
    """Share of points [n, d] in at least one ball with a centre [m, d] and its radius [m]."""
    return float(
        torch.cat([(distances(part, centres) <= radius).any(1) for part in points.split(AT_ONCE)])
        .double()
        .mean()
    )


def density_coverage(
    generated: Tensor, real: Tensor, k: int = DENSITY_NEIGHBOURS
) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, arXiv 2002.09797, eq. 4 and 5).

    Density counts the real neighbourhoods around a sample and can exceed 1. Coverage is the share
    of real neighbourhoods that hold a sample.

    Args:
        generated, real: features, [n, d] and [m, d].
        k: the k-th nearest other feature vector bounds a neighbourhood.
    """
    counts = []
    for part, radius in zip(real.split(AT_ONCE), radii(real, k).split(AT_ONCE), strict=True):
        counts.append((torch.cdist(part, generated) <= radius.unsqueeze(1)).sum(1))
    inside = torch.cat(counts)
    return float(inside.sum()) / (k * len(generated)), float((inside > 0).double().mean())


def inception_style_score(logits: Tensor) -> float:
    """`exp(E KL(p(y|x) || p(y)))` over all samples at once (Salimans et al. 2016, sec. 4).

    The name says "style" because the task's own classifier takes the place of Inception. The score
    lies between 1 and the number of classes.

    Args:
        logits: the classifier's logits, [n, classes].
    """
    log_p = logits.double().log_softmax(1)
    log_marginal = log_p.exp().mean(0).log()
    return float((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())


def class_diversity(features: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor) -> float:
    """Mean distance between two samples of one class, relative to that of real images.

    The ratio is averaged over classes; at 1 samples are as diverse as real images.

    Args:
        features, real: [n, d] and [m, d].
        labels, real_labels: [n] and [m].
    """
    ratios = []
    for label in real_labels.unique():
        spread = [
            torch.pdist(f[found == label]).mean()
            for f, found in ((features, labels), (real, real_labels))
        ]
        ratios.append(spread[0] / spread[1])
    return float(torch.stack(ratios).mean())


def memorised_share(samples: Tensor, training: Images, ratio: float = 1 / 3) -> float:
    """Share of samples that are far closer to one training image than to the next.

    The criterion is `d_1 / d_2 < 1/3` on distances in pixels (Yoon et al. 2023, sec. 3).

    Args:
        samples, training: [n, C, H, W] and [m, C, H, W].
    """
    few, found = samples.flatten(1).split(AT_ONCE), []
    for part in training.split(len(training) if isinstance(training, Tensor) else IMAGES_AT_ONCE):
        images = part.flatten(1)
        found.append(torch.cat([nearest_two(some, images) for some in few]))
    nearest = torch.cat(found, 1).topk(2, largest=False).values
    return float((nearest[:, 0] < ratio * nearest[:, 1]).double().mean())


def nearest_two(samples: Tensor, training: Tensor) -> Tensor:
    """Distances of samples [n, d] to their two nearest training images [m, d]: float64 [n, 2].

    Squared distances in single precision find `CANDIDATES` images for each sample; the distances to
    these are then computed in double precision.
    """
    few, many = samples.float(), training.float()
    # The squared norm of the sample itself is left out: it does not change the order.
    squared = many.square().sum(1) - 2 * few @ many.t()
    near = training[squared.topk(min(CANDIDATES, len(training)), largest=False).indices]
    return (
        (near.double() - samples.double().unsqueeze(1))
        .norm(dim=2)
        .topk(min(2, len(training)), largest=False)
        .values
    )
