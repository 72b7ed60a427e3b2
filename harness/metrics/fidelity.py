"""Distances between two sets of samples in feature space: torch-fidelity's FID and KID."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.metrics.moments import Pair

KID_SUBSETS = 100
"""Pairs of subsets that KID averages over."""


def fid(features: Tensor, reference: Tensor) -> float:
    """Frechet distance between Gaussians that are fitted to two sets of features.

    Heusel et al. 2017, arXiv 1706.08500, eq. 6. The bias is upwards and about proportional to
    1 / n, so two values compare only at equal n.

    Args:
        features, reference: [n, d] and [m, d], float64.
    """
    return frechet_distance(feature_moments(features), feature_moments(reference))


def feature_moments(features: Tensor) -> Pair:
    """Mean [d] and covariance [d, d] of features [n, d], float64, as torch-fidelity takes them."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    found = fid_features_to_statistics(features)
    return torch.from_numpy(found["mu"]), torch.from_numpy(found["sigma"])


def sample_moments(samples: Tensor) -> Pair:
    """Mean [d] and covariance [d, d] of samples [n, d], float64."""
    samples = samples.double()
    return samples.mean(0), torch.cov(samples.t())


def frechet_distance(first: Pair, second: Pair) -> float:
    """Frechet distance between two Gaussians, each a mean [d] and a covariance [d, d], float64.

    Rounding may leave equal Gaussians a little below 0, which no distance is: that counts as 0.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    statistics = [
        {"mu": mean.numpy(), "sigma": covariance.numpy()} for mean, covariance in (first, second)
    ]
    found = float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])
    return 0.0 if found < 0 else found


def fid_of_parts(features: Tensor, reference: Tensor, size: int) -> float:
    """Mean FID of the disjoint parts of `size` samples, which compares with FIDs at N = `size`.

    Args:
        features, reference: [n, d] and [m, d], float64; n is at least `size`.
    """
    parts = features[: len(features) // size * size].split(size)
    return sum(fid(part, reference) for part in parts) / len(parts)


def kid(features: Tensor, reference: Tensor, subset_size: int, subsets: int = KID_SUBSETS) -> float:
    """Unbiased squared MMD under the cubic kernel, averaged over subsets.

    Binkowski et al. 2018, arXiv 1801.01401.

    Args:
        features, reference: [n, d] and [m, d], float64.
        subset_size: samples in a subset, at most n and m.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    result = kid_features_to_metric(
        features, reference, kid_subsets=subsets, kid_subset_size=subset_size, verbose=False
    )
    return float(result[KEY_METRIC_KID_MEAN])


def label_agreement(logits: Tensor, asked: Tensor) -> float:
    """Share of samples that the feature network classifies as the requested label.

    Args:
        logits: the feature network's logits, [n, classes].
        asked: the requested labels, [n].
    """
    return float((logits.argmax(1) == asked).double().mean())


def distance_to_reference(samples: Tensor, reference: Tensor) -> float:
    """Root mean squared difference per pixel between two sets of samples from the same noise.

    Args:
        samples, reference: [n, C, H, W], in [-1, 1].
    """
    return float((samples.double() - reference.double()).square().mean().sqrt())
