"""Drifting's force, on samples and images of known distributions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gaussian import GaussianTask
from torch import Tensor

from harness.diffusion.randomness import Keyed
from harness.errors import UsageError
from harness.methods import Batch
from harness.methods.drifting import RADII, Drifting, DriftingConfig, drifted, force
from harness.tasks import Task

GROUPS, SIZE, DIM = 64, 16, 4


def normal(name: str, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Numbers [GROUPS, SIZE, DIM], float64."""
    drawn = Keyed("drifting", 0).normal(name, torch.arange(GROUPS), (SIZE, DIM))
    return mean + std * drawn.double()


def one_label() -> Tensor:
    return torch.zeros(GROUPS, SIZE, dtype=torch.long)


@pytest.mark.parametrize("radius", RADII)
def test_positives_and_negatives_change_places_with_the_sign(radius: float) -> None:
    x, y = normal("x"), torch.cat([normal("positive"), normal("negative", 1.0)], 1)
    first = (torch.arange(2 * SIZE) < SIZE).double().expand(GROUPS, SIZE, -1)
    same = torch.ones(GROUPS, SIZE, SIZE, dtype=torch.float64)
    found = force(x, y, first, 0.7 * (1 - first), same, radius)
    torch.testing.assert_close(force(x, y, 0.7 * (1 - first), first, same, radius), -found)
    assert float(found.abs().max()) > 0


def mean_and_error(samples: Tensor, images: Tensor) -> tuple[float, float]:
    """The mean drift over all numbers, and its standard error over groups."""
    drift = drifted(samples, images, one_label(), 1.0)[0].mean((1, 2))
    return float(drift.mean()), float(drift.std() / GROUPS**0.5)


def test_equal_distributions_leave_no_mean_drift() -> None:
    mean, error = mean_and_error(normal("x"), normal("y"))
    assert abs(mean) < 4 * error


def test_samples_drift_to_the_images() -> None:
    for shift, sign in ((1.0, -1), (-1.0, 1)):
        mean, error = mean_and_error(normal("x", shift), normal("y"))
        assert sign * mean > 8 * error


def test_narrow_samples_drift_apart() -> None:
    x = normal("x", std=0.2)
    outwards = (drifted(x, normal("y"), one_label(), 1.0)[0] * x).mean((1, 2))
    assert float(outwards.mean()) > 4 * float(outwards.std()) / GROUPS**0.5


def test_other_labels_are_neither_drawn_nor_pushed_without_guidance() -> None:
    """What lies at the other label's place changes nothing but the unit, and so not the sign."""
    labels = (torch.arange(SIZE) % 2).expand(GROUPS, -1)
    x, y = normal("x", 1.0), normal("y")
    moved = y + 3 * labels.unsqueeze(2)
    alone = drifted(x[:, ::2], y[:, ::2], one_label()[:, ::2], 1.0)[0]
    among = drifted(x, moved, labels, 1.0)[0][:, ::2]
    assert float(alone.mean()) < -0.1 > float(among.mean())
    far = drifted(x[:, ::2], y[:, ::2] + 3, one_label()[:, ::2], 1.0)[0]
    assert float(far.mean()) > 0.1


def test_guidance_pushes_from_the_images_of_other_labels() -> None:
    labels = (torch.arange(SIZE) % 2).expand(GROUPS, -1)
    x, y = normal("x"), normal("y") + 1.5 * labels.unsqueeze(2)
    plain, guided = (
        drifted(x, y, labels, w)[0][:, ::2].mean((1, 2)) for w in (1.0, 3.0)
    )  # of the lower label, whose own images are where it is
    off = guided - plain
    assert float(off.mean()) < -8 * float(off.std()) / GROUPS**0.5


def test_samples_share_their_drift_far_from_the_images() -> None:
    near, far = (
        float(drifted(normal("x"), normal("y", shift), one_label(), 1.0)[2]) for shift in (0.0, 3.0)
    )
    assert near < 3 / SIZE  # one part of SIZE if the images had no noise
    assert far > 0.6


def test_the_loss_moves_samples_by_the_drift(tiny: Task) -> None:
    """Descending the loss moves a sample's pixels as the two spaces' drifts do."""
    cpu = torch.device("cpu")
    method: Any = Drifting(DriftingConfig(group=8), tiny.teacher(cpu), tiny, 1, 10)
    assert method.target == "guided data"
    index = torch.arange(8)
    images, cond = tiny.split.train.batch(index)
    x = (0.5 * Keyed("drifting", 1).normal("x", index, (1, 8, 8))).requires_grad_()
    method.with_gradient = lambda *args: x
    method.features = lambda images: [images.flatten(1).double()]
    method.loss(Batch(index, (images, cond), None, Keyed("drifting", 2)))[0].backward()
    flat, real = (each.detach().flatten(1).double().unsqueeze(0) for each in (x, images))
    drift, unit, _ = drifted(flat, real, cond.classes.unsqueeze(0), method.w)
    expected = -2 * drift[0] / float(unit) / x.numel()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.flatten(1), expected.float())


def test_it_is_refused_without_a_classifier_and_for_several_steps(tiny: Task) -> None:
    config, task = DriftingConfig(), GaussianTask("vp")
    task.own_classifier = False  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="the features of the task's own classifier"):
        Drifting.check(config, task, 1)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="num_steps is 2, but drifting has one step: give 1"):
        Drifting.check(config, tiny, 2)
    Drifting.check(config, tiny, 1)
