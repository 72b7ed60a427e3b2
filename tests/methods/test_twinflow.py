"""TwinFlow: RCGM's error falls with h, and the twin flow finds and rectifies the samples' law."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gaussian import COUNT, MEAN, SHAPE, STD, GaussianTask, Model, jump, posterior, with_v
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Prediction
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.diffusion.schedules import Schedule
from harness.methods import Batch
from harness.methods.parts.student import velocity
from harness.methods.twinflow import TwinFlow, TwinFlowConfig, root_loss, rows

LABELS = Condition(torch.zeros(COUNT, dtype=torch.long))


def twin(x: Tensor, t: Tensor, cond: Condition, schedule: Schedule) -> Prediction:
    """The exact jumps, and a second branch whose data are the first's, moved up by 0.5."""
    first, moved = jump(x, t, cond, schedule), posterior(x, t, cond, schedule)
    alpha = schedule.alpha_sigma(t)[0].reshape(-1, 1, 1, 1)
    moved = posterior(x - 0.5 * alpha, t, cond, schedule)
    moved = with_v(moved.x_0 + 0.5, moved.eps, t, schedule)
    fake = cond.scalars["fake"].reshape(-1, 1, 1, 1) > 0
    pairs = zip(vars(moved).values(), vars(first).values(), strict=True)
    return Prediction(*(torch.where(fake, a, b) for a, b in pairs))


def gaussian(formula: Any = jump, schedule: str = "flow", **options: Any) -> Any:
    task = GaussianTask(schedule)
    with keyed_initialisation(0, "twinflow"):
        teacher = Model(posterior, task.schedule)
        method = TwinFlow(TwinFlowConfig(**options), teacher, task, 1, 10)  # type: ignore[arg-type]
    method.model = method.target_model = Model(formula, task.schedule)  # type: ignore[assignment]
    return method


def batch_of(step: int) -> Batch:
    index, keys = torch.arange(step * COUNT, (step + 1) * COUNT), Keyed("train", 0, step)
    return Batch(
        index, ((MEAN + STD * keys.normal("x", index, SHAPE)).double(), LABELS), None, keys
    )


def recursive_error(method: Any) -> float:
    """Root mean square of g at the method's own times, with the exact velocity."""
    batch, real = batch_of(0), rows(COUNT, 0, 3, torch.device("cpu"))
    tau, rho = (time[real] for time in method.times(batch))
    tau, rho = tau.clamp(max=0.98), torch.minimum(rho, tau.clamp(max=0.98))
    cond = LABELS[real]
    eps = batch.normal("eps", SHAPE)[real].double()
    y = batch.data[0][real] * (1 - tau).reshape(-1, 1, 1, 1) + tau.reshape(-1, 1, 1, 1) * eps  # type: ignore[index]
    v = method.velocity_at(method.teacher, y, tau, cond)
    F = method.F(method.model, y, tau, rho, cond)
    g = method.error(F, v, y, tau, rho, cond)[tau - rho >= 0.08]
    return float(g.square().mean().sqrt())


@pytest.mark.parametrize("schedule", ["flow", "vp"])
def test_the_recursive_error_falls_with_h_at_exact_jumps(schedule: str) -> None:
    errors = [recursive_error(gaussian(jump, schedule, h=h)) for h in (0.04, 0.02, 0.01)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.15)
    assert recursive_error(gaussian(posterior, schedule)) > 20 * errors[2]


@pytest.mark.parametrize("schedule", ["flow", "vp"])
def test_short_jumps_learn_the_velocity(schedule: str) -> None:
    """Where t - t' < h, g is F - v."""
    method, tau = gaussian(jump, schedule), torch.full((COUNT,), 0.5, dtype=torch.float64)
    y, v = (Keyed("test", 0).normal(name, torch.arange(COUNT), SHAPE).double() for name in "yv")
    F = torch.ones_like(y)
    found = method.error(F, v, y, tau, tau - 0.005, LABELS)
    torch.testing.assert_close(found, F - v)


def test_samples_move_against_the_difference_of_the_twin_velocities(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Descending the loss moves F up, and so the samples down, where the fakes lie above the data.

    Where the branches agree nothing moves.
    """
    batch, found = batch_of(0), []
    for formula in (jump, twin):
        gradients = []
        for rectify in (1.0, 0.0):
            method = gaussian(formula, rectify=rectify)
            monkeypatch.setattr(method, "error", lambda F, *args: 0 * F)
            method.loss(batch)[0].backward()
            gradients.append(float(method.model.distortion.grad[1]))
        found.append(gradients[0] - gradients[1])
    assert found[0] == 0
    assert found[1] < -0.2


@pytest.mark.parametrize("schedule", ["flow", "vp"])
def test_the_second_branch_finds_the_velocity_of_the_samples(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With exact jumps the samples are data, so the second branch is exact where the first is."""
    for formula, right in ((jump, True), (twin, False)):
        method, found = gaussian(formula, schedule, rectify=0.0, label_dropout=0.0), []
        # What the other kinds learn is what they have.
        monkeypatch.setattr(method, "error", lambda F, *args: 0 * F)
        for step in range(24):
            method.model.distortion.grad = None
            method.loss(batch_of(step))[0].backward()
            found.append(method.model.distortion.grad.clone())
        gradients = torch.stack(found)
        z = (gradients.mean(0).abs() / (gradients.std(0) / len(found) ** 0.5)).max()
        assert float(z) < 4 if right else float(z) > 8


def test_each_kind_has_a_quarter_and_its_times() -> None:
    method = gaussian()
    tau, rho = (time.unflatten(0, (-1, 4)) for time in method.times(batch_of(0)))
    assert bool((tau[:, 0] == method.last).all())
    assert bool((rho[:, 0] == 0).all())
    assert bool((rho[:, 1] >= 0.95 * tau[:, 1] - 1e-12).all())
    assert float((rho / tau)[:, 2].min()) < 0.05
    assert bool((rho[:, 3] == tau[:, 3]).all())


def test_the_loss_is_about_the_root_of_the_mean_square() -> None:
    off = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    assert float(root_loss(off)) == pytest.approx(0.5, rel=1e-5)
    assert float(root_loss(0 * off)) == 0


def test_guidance_has_the_tasks_scale_at_its_fixed_point() -> None:
    """F = v_null + w (v - v_null) is kept by v + r (F - v_null), with r = 1 - 1 / w."""
    method, w = gaussian(jump), 2.5
    method.r = 1 - 1 / w
    tau = torch.full((COUNT,), 0.5, dtype=torch.float64)[: COUNT * 3 // 4]
    y, cond, batch = torch.zeros(len(tau), *SHAPE).double(), LABELS[: len(tau)], batch_of(0)
    v = velocity(posterior(y, tau, cond, method.schedule))
    null = 0.1 * torch.ones_like(v)
    fixed = null + w * (v - null)

    def F(model: Any, y: Tensor, tau: Tensor, rho: Tensor, cond: Condition) -> Tensor:
        return torch.where(cond.classes.reshape(-1, 1, 1, 1) == 0, fixed, null)

    method.F = F
    found = method.guided(v, y, tau, cond, batch)
    kept = ~method.dropped(batch)[rows(COUNT, 0, 3, torch.device("cpu"))]
    torch.testing.assert_close(found[kept], fixed[kept])
    torch.testing.assert_close(found[~kept], v[~kept])
