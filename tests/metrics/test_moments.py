"""Numbers of sets that come in batches equal those of whole sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

from harness.diffusion.randomness import Keyed
from harness.metrics.fidelity import fid, frechet_distance
from harness.metrics.moments import Moments, SplitScores


def normal(name: str, *shape: int) -> Tensor:
    return Keyed("test", 0).normal(name, torch.arange(shape[0]), shape[1:])


def moments(vectors: Tensor, *sizes: int) -> Moments:
    found = Moments()
    for part in vectors.split(list(sizes)):
        found.add(part)
    return found


def test_streamed_moments_are_numpys() -> None:
    """Far from zero, where sums of squares lose their digits."""
    vectors = normal("features", 50, 7) + 1e4
    mean, covariance = moments(vectors, 1, 30, 2, 17).pair
    whole = vectors.double().numpy()
    np.testing.assert_allclose(mean.numpy(), whole.mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance.numpy(), np.cov(whole, rowvar=False), atol=1e-9)


def test_the_frechet_distance_of_streamed_moments_is_torch_fidelitys() -> None:
    a, b = normal("a", 60, 8).double(), 1.5 * normal("b", 40, 8).double() + 0.3
    streamed = frechet_distance(moments(a, 13, 47).pair, moments(b, 39, 1).pair)
    assert streamed == pytest.approx(fid(a, b), rel=1e-10)


def scores(logits: Tensor, splits: int, size: int = 9) -> float:
    found = SplitScores(len(logits), splits)
    for part in logits.split(size):
        found.add(part)
    return found.mean


def direct(logits: Tensor) -> float:
    """exp(E KL(p(y|x) || p(y)))."""
    p = logits.double().softmax(1).numpy()
    return float(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))


def test_the_inception_score_is_the_mean_over_contiguous_parts() -> None:
    logits = 3 * normal("logits", 60, 5)
    parts = [direct(part) for part in logits.split(20)]
    assert scores(logits, 3) == pytest.approx(sum(parts) / 3, rel=1e-12)
    assert scores(logits, 1) == pytest.approx(direct(logits), rel=1e-12)
    # Of 61 samples the third part has one more.
    more = 3 * normal("logits", 61, 5)
    parts = [direct(part) for part in more.split([20, 20, 21])]
    assert scores(more, 3) == pytest.approx(sum(parts) / 3, rel=1e-12)


def test_the_inception_score_is_torch_fidelitys_without_shuffling() -> None:
    logits = 3 * normal("logits", 50, 8).double()
    found = isc_features_to_metric(logits, splits=10, shuffle=False)[KEY_METRIC_ISC_MEAN]
    assert scores(logits, 10) == pytest.approx(found, rel=1e-10)


def test_sorting_by_class_lowers_the_inception_score() -> None:
    labels = torch.arange(100) % 10
    logits = 8.0 * torch.nn.functional.one_hot(labels, 10)
    assert scores(logits, 10) > 9
    assert scores(logits[labels.argsort()], 10) == pytest.approx(1, abs=1e-9)


def test_fewer_samples_than_parts() -> None:
    assert scores(normal("logits", 3, 4), 10) == pytest.approx(1)
