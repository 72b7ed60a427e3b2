"""Mirroring the images of the feature network's training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.methods.base import Batch
from harness.methods.parts.classification import Classification
from harness.tasks import Task


def augmented(task: Task, images: Tensor, **options: Any) -> Tensor:
    method = Classification(Classification.Config(**options), None, task, 1, 10)
    return method.augmented(images, Batch(torch.arange(len(images)), None, None, Keyed("train", 0, 0)))


def loss(task: Task, images: Tensor, index: Tensor, **options: Any) -> Tensor:
    """Of the samples `index`, whose images these are."""
    with keyed_initialisation(0, "classifier"):
        method = Classification(Classification.Config(**options), None, task, 1, 10)
    return method.loss(Batch(index, (images, Condition(index % 10)), None, Keyed("train", 0, 0)))[0]


@pytest.fixture
def images() -> Tensor:
    return torch.arange(200 * 64.0).view(200, 1, 8, 8) / 12800


def test_images_stay_as_they_are(tiny: Task, images: Tensor) -> None:
    assert torch.equal(augmented(tiny, images), images)


def test_the_share_that_is_asked_for_is_mirrored(tiny: Task, images: Tensor) -> None:
    found = augmented(tiny, images, flip=0.25)
    mirrored = (found == images.flip(-1)).flatten(1).all(1)
    assert ((found == images).flatten(1).all(1) ^ mirrored).all()
    assert 0.15 < mirrored.double().mean() < 0.35
    assert torch.equal(augmented(tiny, images, flip=1.0), images.flip(-1))


def test_the_loss_is_of_what_was_augmented(tiny: Task, images: Tensor) -> None:
    index = torch.arange(len(images))
    assert loss(tiny, images, index, flip=1.0) == loss(tiny, images.flip(-1), index)
    assert loss(tiny, images, index, flip=1.0) != loss(tiny, images, index)


def test_micro_batches_are_augmented_as_the_whole(tiny: Task, images: Tensor) -> None:
    index, options = torch.arange(len(images)), {"flip": 0.5}
    parts = [loss(tiny, images[part], part, **options) for part in index.split(50)]
    torch.testing.assert_close(sum(parts) / 4, loss(tiny, images, index, **options), rtol=1e-4, atol=1e-5)
