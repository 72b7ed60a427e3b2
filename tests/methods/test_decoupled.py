"""Decoupled DMD: DMD2's gradient where both parts share their noise, and guidance of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gaussian import MEAN, SHAPE, STD, GaussianTask, Model, end, posterior, with_v
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Guided, Prediction
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.diffusion.schedules import Schedule
from harness.errors import UsageError
from harness.methods import METHODS, Batch
from harness.tasks import Task

SIZE, PLACE = 64, 1


def classes(x: Tensor, t: Tensor, cond: Condition, schedule: Schedule) -> Prediction:
    """The data's denoiser; without a label, that of data moved down by 0.5."""
    alpha = schedule.alpha_sigma(t)[0].reshape(-1, 1, 1, 1)
    off = 0.5 * (cond.classes == 1).double().reshape(-1, 1, 1, 1)
    found = posterior(x + alpha * off, t, cond, schedule)
    return with_v(found.x_0 - off, found.eps, t, schedule)


def gaussian(renoising: str, scale: float, fake: Any = posterior) -> Any:
    """DMD2 with exact scores, whose samples at step `PLACE` are data."""
    task = GaussianTask("vp")
    teacher: Any = Guided(Model(classes, task.schedule), scale, task.null)  # type: ignore[arg-type]
    cls = METHODS["dmd2"]
    with keyed_initialisation(0, "dmd2"):
        config = cls.Config(renoising=renoising, student_gan=0.0, fake_gan=0.0)  # type: ignore[call-arg]
        method: Any = cls(config, teacher, task, 4, 100)  # type: ignore[arg-type]
    method.matching.model = Model(fake, task.schedule)
    return method


def gradient_of(method: Any) -> tuple[Tensor, Tensor]:
    """The gradient of the student's loss with respect to its samples, and the samples."""
    index, keys = torch.arange(SIZE), Keyed("train", 0)
    x = (MEAN + STD * keys.normal("x", index, SHAPE)).double().requires_grad_()
    method.generate = lambda *args: x
    data = x.detach(), Condition(torch.zeros(SIZE, dtype=torch.long))
    method.loss_at(Batch(index, data, None, keys), PLACE)[0].backward()
    assert x.grad is not None
    return x.grad * x.numel(), x.detach()


def scale_of(method: Any, x: Tensor, teacher: Guided) -> Tensor:
    """The mean of |x - x_real| at the scores' noise, which divides the gradient."""
    index, keys = torch.arange(SIZE), Keyed("train", 0)
    batch = Batch(index, None, None, keys)
    x_t, t = method.matching.noised(x, batch, "student")
    real = teacher(x_t, t, Condition(torch.zeros(SIZE, dtype=torch.long))).x_0
    return (x - real).abs().flatten(1).mean(1).reshape(-1, 1, 1, 1)


def test_with_shared_noise_it_is_dmd2s_gradient() -> None:
    shared, decoupled = gaussian("shared", 2.0, end), gaussian("decoupled", 2.0, end)
    noised = decoupled.matching.noised
    decoupled.matching.noised = lambda x, batch, *names, **more: noised(x, batch, "student")
    (plain, x), (found, _) = gradient_of(shared), gradient_of(decoupled)
    teacher = shared.teacher
    expected = plain * scale_of(shared, x, teacher) / scale_of(shared, x, teacher.at(1.0))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_its_first_part_stops_where_the_fake_score_is_the_teacher() -> None:
    assert float(gradient_of(gaussian("decoupled", 1.0))[0].abs().max()) < 1e-12
    assert float(gradient_of(gaussian("decoupled", 1.0, end))[0].abs().max()) > 1e-2


def refused(task: Task, **options: str) -> str:
    """The sentence with which DMD2 refuses these options on a task."""
    cls = METHODS["dmd2"]
    with pytest.raises(UsageError) as found:
        cls.check(cls.Config(renoising="decoupled", **options), task, 4)  # type: ignore[call-arg]
    return str(found.value)


def test_it_is_refused_where_it_would_be_dmd2_under_another_name(tiny: Task) -> None:
    assert "guidance scale 1 equals shared" in refused(GaussianTask("vp"))  # type: ignore[arg-type]
    cls = METHODS["dmd2"]
    cls.check(cls.Config(), GaussianTask("vp"), 4)  # type: ignore[arg-type]
    cls.check(cls.Config(renoising="decoupled"), tiny, 4)  # type: ignore[call-arg]


def test_it_is_refused_with_a_divergence_which_would_weigh_guidance(tiny: Task) -> None:
    assert "divergence is js" in refused(tiny, divergence="js")


def test_guidance_moves_samples_away_from_the_null_condition() -> None:
    """The null data lie below, so descending moves the samples up, twice as far for w - 1 = 2."""
    one, two = (gradient_of(gaussian("decoupled", scale))[0] for scale in (2.0, 3.0))
    assert bool((one < 0).all())
    torch.testing.assert_close(two, 2 * one)


def test_guidance_is_compared_below_the_steps_start() -> None:
    method, seen = gaussian("decoupled", 2.0), []
    change = method.teacher.change

    def watched(x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        seen.append(t)
        return change(x_t, t, cond)

    method.teacher.change = watched
    gradient_of(method)
    (t,) = seen
    assert 0.02 <= float(t.min()) < 0.1
    assert 0.65 < float(t.max()) <= float(method.levels[PLACE]) == 0.75
