"""What must not change a number, and what must: relations that hold whatever the number is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor

from harness.data.images import ImageSet, to_uint8
from harness.diffusion.randomness import Keyed
from harness.files import tensors_digest
from harness.metrics.caveats import collapse
from harness.metrics.evaluator import Evaluator
from harness.metrics.features import classify
from harness.metrics.fidelity import feature_moments, fid, frechet_distance, kid
from harness.metrics.moments import Moments
from harness.metrics.sampling import sample_set
from harness.solvers import Noise
from harness.tasks import Task

CPU = torch.device("cpu")
OF_SETS = ("fid", "kid", "recall", "precision", "coverage", "density", "inception_style_score")
"""Metrics of whole sets: the order of samples means nothing to them."""


def normal(name: str, *shape: int) -> Tensor:
    return Keyed("test", 0).normal(name, torch.arange(shape[0]), shape[1:])


def changed(task: Task, **evaluation: Any) -> Task:
    spec = task.spec.evaluation.model_copy(update=evaluation)
    return Task(task.spec.model_copy(update={"evaluation": spec}))


def of_real(task: Task) -> Task:
    """The task with as many samples as it has training images."""
    return changed(task, samples=len(task.split.train))


def measured(task: Task, images: Tensor) -> dict[str, float]:
    found = Evaluator(task, lambda k: images, CPU).evaluate({0: images})
    return {name: metric.mean for name, metric in found.items()}


def test_a_set_has_no_distance_to_itself(tiny: Task) -> None:
    real = tiny.split.train.images
    network = tiny.classifier(CPU)
    whole = classify(network, real)[0]
    scale = fid(classify(network, real + 0.1 * normal("noise", *real.shape))[0], whole)
    assert 0 <= measured(of_real(tiny), real)["fid"] < 1e-5 * scale
    assert 0 <= fid(whole, whole.flip(0)) < 1e-5 * scale


def test_the_order_of_samples_means_nothing(tiny: Task) -> None:
    """Where labels do not count; a label goes with its sample."""
    real = tiny.split.train.images[:300] + 0.2 * normal("noise", 300, 1, 8, 8)
    task = changed(tiny, samples=300, kid_subset_size=300)
    order = Keyed("test", 1).permutation("order", 300)
    first, second = measured(task, real), measured(task, real[order])
    for name in OF_SETS:
        assert second[name] == pytest.approx(first[name], rel=1e-6), name
    assert second["class_diversity"] != pytest.approx(first["class_diversity"], rel=1e-5)


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_the_size_of_a_batch_means_nothing(size: int, tiny: Task) -> None:
    images = tiny.split.train.images[:150] + 0.2 * normal("noise", 150, 1, 8, 8)
    network = tiny.classifier(CPU)
    whole, reference = classify(network, images)[0], classify(network, tiny.split.train.images)[0]
    found = fid(classify(network, images, batch_size=size)[0], reference)
    assert found == pytest.approx(fid(whole, reference), rel=1e-6)
    parts = Moments()
    for part in whole.split(size):
        parts.add(part)
    merged = frechet_distance(parts.pair, feature_moments(reference))
    assert merged == pytest.approx(fid(whole, reference), rel=1e-6)


def test_the_size_of_a_sampling_batch_means_nothing(tiny: Task) -> None:
    """Noise, conditions and what a sampler draws on the way belong to the sample."""

    def sampler(x_T: Tensor, cond: Any, noise: Noise) -> Tensor:
        return x_T + cond.labels.reshape(-1, 1, 1, 1) + noise("on the way")

    found = [sample_set(sampler, changed(tiny, batch_size=size), 1, CPU) for size in (1, 16, 40)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], sample_set(sampler, tiny, 0, CPU))


def test_more_noise_is_farther(tiny: Task) -> None:
    real, network = tiny.split.train.images, tiny.classifier(CPU)
    noise = normal("noise", *real.shape)
    whole = classify(network, real)[0]
    noisy = [classify(network, real + level * noise)[0] for level in (0.0, 0.1, 0.2, 0.4, 0.8)]
    for distance in (fid, partial(kid, subset_size=1000, subsets=2)):
        values = [distance(features, whole) for features in noisy]
        assert values == sorted(values)
        assert values[0] < 0.1 * values[1]


def by_square_root(a: Tensor, b: Tensor) -> float:
    """The Frechet distance by SciPy's matrix square root, in float64."""
    x, y = a.numpy(), b.numpy()
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(first @ second).real
    apart = x.mean(0) - y.mean(0)
    return float(apart @ apart + np.trace(first + second - 2 * root))


def by_eigenvalues(a: Tensor, b: Tensor) -> float:
    """The same by the eigenvalues of a symmetric product, in float64."""
    x, y = a.numpy(), b.numpy()
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    inner = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    apart = x.mean(0) - y.mean(0)
    return float(apart @ apart + np.trace(first) + np.trace(second) - 2 * inner)


@pytest.mark.parametrize("reference", [by_square_root, by_eigenvalues])
def test_fid_is_that_of_a_float64_reference(reference: Callable, tiny: Task) -> None:
    wide = normal("a", 400, 32).double() @ normal("mix", 32, 32).double()
    for a, b in (
        (normal("a", 300, 16).double(), 0.5 + 1.5 * normal("b", 200, 16).double()),
        (wide, 1e3 + normal("b", 400, 32).double()),
        (1e-3 * wide, 1e-3 * normal("b", 400, 32).double()),
    ):
        assert fid(a, b) == pytest.approx(reference(a, b), rel=1e-6)
    network, real = tiny.classifier(CPU), tiny.split.train.images
    mine = classify(network, real + 0.3 * normal("noise", *real.shape))[0]
    theirs = classify(network, real)[0]
    assert fid(mine, theirs) == pytest.approx(reference(mine, theirs), rel=1e-6)


def test_one_changed_sample_is_another_set() -> None:
    """Also by the least step of 8 bits, and also where two samples change places."""
    images = to_uint8(normal("images", 40, 1, 8, 8)).float() / 127.5 - 1
    labels = torch.arange(40) % 10
    whole = ImageSet(images, labels).content()
    other, swapped, relabelled = images.clone(), images.clone(), labels.clone()
    other[17, 0, 3, 5] += (2 if other[17, 0, 3, 5] < 0 else -2) / 255
    swapped[[3, 4]] = images[[4, 3]]
    relabelled[9] = 0
    sets = [ImageSet(other, labels), ImageSet(swapped, labels), ImageSet(images, relabelled)]
    assert len({whole, *(one.content() for one in sets)}) == 4
    assert ImageSet(images + 1e-4, labels).content() == whole  # 8 bits see no difference
    bits = images.view(torch.int32).clone()
    bits[39, 0, 7, 7] ^= 1
    parts = {tensors_digest({"samples": x}) for x in (images, bits.view(torch.float32))}
    assert len(parts) == 2


def test_a_collapsed_student_is_flagged(tiny: Task) -> None:
    real = tiny.split.train.images[:40]
    numbers = tiny.evaluation_numbers(0)
    one_a_class, one_image = real[:10].repeat(4, 1, 1, 1), real[:1].expand(40, -1, -1, -1)
    assert torch.equal(numbers, torch.arange(40) % 10)
    for samples in (one_a_class, one_image, one_a_class + 0.05 * normal("noise", 40, 1, 8, 8)):
        assert collapse(samples, real, numbers).startswith("collapsed: samples of one condition")
        assert Evaluator(tiny, lambda k: real, CPU).beside_teacher(samples)
    for samples in (real, real.flip(0), real + 0.5 * normal("noise", 40, 1, 8, 8), 0.5 * real):
        assert collapse(samples, real, numbers) == ""
    alone = torch.arange(40)  # each sample has a prompt of its own
    assert collapse(one_image, real, alone).startswith("collapsed")
    assert collapse(real, real, alone) == ""
