"""Metrics on sets whose answers are known.

They are the nearest-neighbour metrics, the inception-style score, diversity and memorisation.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.diffusion.randomness import Keyed
from harness.metrics import manifold
from harness.metrics.manifold import (
    Distances,
    class_diversity,
    density_coverage,
    half_distances,
    inception_style_score,
    memorised_share,
    nearest_two,
    precision_recall,
    radii,
)


def normal(n: int, seed: int, d: int = 8) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_radii_on_a_line() -> None:
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert radii(line, 1).tolist() == [1, 1, 2, 4]
    assert radii(line, 2).tolist() == [3, 2, 3, 6]


def test_a_set_against_itself_is_perfect() -> None:
    real = normal(100, 0)
    assert precision_recall(real, real) == (1.0, 1.0)
    density, coverage = density_coverage(real, real)
    assert coverage == 1.0
    assert density == pytest.approx(1.2)  # each of 5 neighbours, and the sample itself


def test_parts_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published definitions on whole matrices of distances."""
    generated, real = normal(70, 0), normal(50, 1)
    between, own = (
        torch.cdist(generated, real),
        {k: torch.cdist(real, real).kthvalue(k + 1, dim=1).values for k in (3, 5)},
    )
    around = torch.cdist(generated, generated).kthvalue(4, dim=1).values
    for at_once in (7, 1000):
        monkeypatch.setattr(manifold, "AT_ONCE", at_once)
        precision, recall = (between <= own[3]).any(1), (between <= around.unsqueeze(1)).any(0)
        assert precision_recall(generated, real) == (
            float(precision.double().mean()),
            float(recall.double().mean()),
        )
        inside = between <= own[5]
        expected = (float(inside.double().sum(1).mean() / 5), float(inside.any(0).double().mean()))
        assert density_coverage(generated, real) == pytest.approx(expected, rel=1e-12)


def test_sets_far_apart_share_nothing() -> None:
    assert precision_recall(normal(50, 0), normal(50, 1) + 100) == (0.0, 0.0)
    assert density_coverage(normal(50, 0), normal(50, 1) + 100) == (0.0, 0.0)


def test_a_collapsed_set_keeps_precision_and_loses_recall() -> None:
    real = normal(300, 0)
    collapsed = real[:1] + 1e-3 * normal(300, 1)
    precision, recall = precision_recall(collapsed, real)
    assert precision == 1.0
    assert recall < 0.02
    assert density_coverage(collapsed, real)[1] < 0.1


def test_precision_and_recall_swap_with_the_sets() -> None:
    narrow, wide = 0.5 * normal(200, 0), normal(200, 1)
    precision, recall = precision_recall(narrow, wide)
    assert precision_recall(wide, narrow) == (recall, precision)
    assert precision > recall


def test_inception_style_score_from_one_to_the_number_of_classes() -> None:
    sure = 50 * torch.eye(10).repeat(3, 1)
    assert inception_style_score(sure) == pytest.approx(10.0)
    assert inception_style_score(sure[:1].repeat(30, 1)) == pytest.approx(1.0)
    assert inception_style_score(torch.zeros(30, 10)) == pytest.approx(1.0)


def test_class_diversity_is_a_ratio_of_spreads() -> None:
    real, labels = normal(200, 0), torch.arange(200) % 2
    # The classes are far apart; the distance between them must not count.
    shifted = real + labels.unsqueeze(1) * 100
    assert class_diversity(0.5 * shifted, labels, shifted, labels) == pytest.approx(0.5)
    assert class_diversity(torch.zeros_like(real), labels, real, labels) == 0.0


def test_memorised_samples_are_near_one_image_alone() -> None:
    training = normal(50, 0, 64).reshape(50, 1, 8, 8)
    near = training[:10] + 0.01
    fresh = normal(10, 1, 64).reshape(10, 1, 8, 8)
    assert memorised_share(torch.cat([near, fresh]), training) == 0.5
    between = (training[:1] + training[1:2]) / 2
    assert memorised_share(between, training) == 0.0
    assert math.isclose(memorised_share(training, training), 1.0)


def test_the_nearest_two_of_many_are_exact() -> None:
    """Also where single precision cannot tell them apart."""
    training = normal(3000, 0, 64).float()
    training[1] = training[0] + 1e-4
    training[2] = training[0] - 3e-4
    samples = torch.cat([normal(700, 1, 64).float(), training[:1] + 1e-6])
    found = nearest_two(samples, training)
    exact = (
        (samples.double().unsqueeze(1) - training.double())
        .norm(dim=2)
        .topk(2, largest=False)
        .values
    )
    assert torch.allclose(found, exact, rtol=1e-12, atol=0)
    images = samples.reshape(-1, 1, 8, 8)
    share = (exact[:, 0] < exact[:, 1] / 3).double().mean()
    assert memorised_share(images, training.reshape(-1, 1, 8, 8)) == float(share) == 1 / 701


def half_brute_force(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """ADM's squared distances with NumPy's float16, one pair at a time."""
    a, b = a.astype(np.float16), b.astype(np.float16)
    found = np.empty((len(a), len(b)), np.float32)
    for i, u in enumerate(a):
        for j, v in enumerate(b):
            inner = np.float16(u.astype(np.float32) @ v.astype(np.float32))
            first, second = (np.float16(np.sum(x * x, dtype=np.float32)) for x in (u, v))
            found[i, j] = max(np.float16(np.float16(first - 2 * inner) + second), 0)
    return found


def test_half_distances_are_rounded_as_float16() -> None:
    a, b = (Keyed("test", 0).normal(name, torch.arange(40), (33,)) for name in ("a", "b"))
    expected = half_brute_force(a.numpy(), b.numpy())
    # A sum of products may fall on the other side of a half.
    np.testing.assert_allclose(half_distances(a, b).numpy(), expected, rtol=3e-3, atol=0.1)
    assert np.mean(half_distances(a, b).numpy() == expected) > 0.98
    exact = torch.cdist(a.double(), b.double()).square().float()
    assert not torch.equal(half_distances(a, b), exact)
    torch.testing.assert_close(half_distances(a, b), exact, rtol=0.01, atol=0.05)


def test_distances_beyond_float16_are_taken_in_float32() -> None:
    a = 300 * Keyed("test", 0).normal("a", torch.arange(5), (9,))
    exact = torch.cdist(a.double(), a.double() + 1).square().float()
    torch.testing.assert_close(half_distances(a, a + 1), exact, rtol=1e-3, atol=1.0)


@pytest.mark.parametrize("distances", [torch.cdist, half_distances])
def test_precision_and_recall_by_brute_force(distances: Distances) -> None:
    """k = 3: a point is inside if one neighbourhood of the other set holds it."""
    a, b = (Keyed("test", 0).normal(name, torch.arange(25), (4,)).double() for name in ("a", "b"))

    def inside(points: torch.Tensor, centres: torch.Tensor) -> float:
        found = 0
        for point in points:
            for centre in centres:
                apart = sorted(float(distances(centre[None], other[None])) for other in centres)
                if float(distances(point[None], centre[None])) <= apart[3]:
                    found += 1
                    break
        return found / len(points)

    assert precision_recall(a, 1.5 * b, 3, distances) == (inside(a, 1.5 * b), inside(1.5 * b, a))
