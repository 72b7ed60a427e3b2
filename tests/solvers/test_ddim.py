"""DDIM against the closed-form denoiser of a Gaussian, and the sampling loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Prediction, predict
from harness.diffusion.schedules import VPSchedule, few_step_levels
from harness.solvers import DDIM, SOLVERS, Solver, ddim_step, sample, trace
from harness.solvers.ddim import implied_x_0

SCHEDULE = VPSchedule()
COND = Condition(torch.tensor([0, 1]))
MEAN, DEVIATION = 0.7, 0.4  # of the data


class Gaussian:
    """The exact denoiser of data N(mu, s^2), in float64.

    `E[x_0 | x_t] = mu + alpha s^2 (x_t - alpha mu) / (alpha^2 s^2 + sigma^2)`.
    """

    schedule = SCHEDULE

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        alpha, sigma = SCHEDULE.alpha_sigma(t)
        x_0 = MEAN + alpha * DEVIATION**2 * (x_t - alpha * MEAN) / spread(t) ** 2
        eps = (x_t - alpha * x_0) / sigma
        return Prediction(x_0, eps, alpha * eps - sigma * x_0)


def spread(t: Tensor) -> Tensor:
    """Standard deviation of x_t."""
    alpha, sigma = SCHEDULE.alpha_sigma(t)
    return (alpha**2 * DEVIATION**2 + sigma**2).sqrt()


def carried(x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The exact ODE from t to s: the standardised x_t does not change."""
    (alpha_t, _), (alpha_s, _) = SCHEDULE.alpha_sigma(t), SCHEDULE.alpha_sigma(s)
    return alpha_s * MEAN + spread(s) * (x_t - alpha_t * MEAN) / spread(t)


def noise() -> Tensor:
    """x_T [2, 1, 4, 4], float64."""
    return torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("start", "end"), [(0.9, 0.1), (1.0, 0.0)], ids=["inside", "noise to data"]
)
def test_ddim_is_of_first_order(start: float, end: float) -> None:
    steps, errors = [25, 50, 100, 200], []
    for n in steps:
        levels = torch.linspace(start, end, n + 1, dtype=torch.float64)
        found = sample(DDIM(), Gaussian(), noise(), levels, COND)
        errors.append(float((found - carried(noise(), levels[0], levels[-1])).abs().max()))
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert 0.8 < order < 1.3
    assert errors[-1] < 0.02


def test_ddim_is_exact_where_the_data_are_one_point() -> None:
    class Point:
        schedule = SCHEDULE

        def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
            return predict(torch.full_like(x_t, MEAN), x_t, t, SCHEDULE, "x_0")

    for steps in (1, 3):
        found = sample(DDIM(), Point(), noise().float(), few_step_levels(steps), COND)
        torch.testing.assert_close(found, torch.full_like(found, MEAN))


def test_a_step_follows_the_equation() -> None:
    prediction = Prediction(
        torch.full((2, 1, 4, 4), 2.0), torch.full((2, 1, 4, 4), 3.0), torch.zeros(2, 1, 4, 4)
    )
    for s in (torch.tensor(0.5), torch.tensor([0.3, 0.6])):
        alpha, sigma = SCHEDULE.alpha_sigma(s)
        expected = (2 * alpha + 3 * sigma).float().reshape(-1, 1, 1, 1).expand(2, 1, 4, 4)
        torch.testing.assert_close(ddim_step(prediction, s, SCHEDULE), expected)


@pytest.mark.parametrize(
    ("t", "s"),
    [
        (torch.tensor(1.0), torch.tensor(0.75)),
        (torch.tensor([0.9, 0.25]), torch.tensor([0.5, 0.0])),
    ],
)
def test_the_implied_x_0_of_a_step_is_the_one_it_used(t: Tensor, s: Tensor) -> None:
    x_t = noise().float()
    prediction = predict(x_t.sin(), x_t, t, SCHEDULE, "v")
    found = implied_x_0(x_t, ddim_step(prediction, s, SCHEDULE), t, s, SCHEDULE)
    torch.testing.assert_close(found, prediction.x_0, rtol=0, atol=1e-4)


def test_a_trajectory_holds_every_state_and_prediction() -> None:
    levels = few_step_levels(4)
    path = trace(DDIM(), Gaussian(), noise(), levels, COND)
    assert path.steps == 4
    assert path.cond is COND
    assert torch.equal(path.levels, levels)
    assert torch.equal(path.states[:, 0], noise())
    assert torch.equal(path.states[:, -1], sample(DDIM(), Gaussian(), noise(), levels, COND))
    for k in range(4):
        prediction = Gaussian()(path.states[:, k], levels[k], COND)
        assert torch.equal(path.predictions[:, k], prediction.x_0)
        assert torch.equal(path.states[:, k + 1], ddim_step(prediction, levels[k + 1], SCHEDULE))


def test_the_last_step_returns_its_prediction() -> None:
    path = trace(DDIM(), Gaussian(), noise(), few_step_levels(3), COND)
    assert torch.equal(path.states[:, -1], path.predictions[:, -1])


def test_sampling_carries_a_solvers_state_and_noise() -> None:
    class Counting(Solver):
        """Adds noise and counts its steps."""

        def init(self, model, x_T, cond):
            return 10

        def step(self, model, x_t, t, s, cond, state, noise):
            return x_t + noise(f"step {state}"), x_t, state + 1

    asked = []

    def one(name: str) -> Tensor:
        asked.append(name)
        return torch.ones(2, 1, 4, 4)

    found = sample(Counting(), None, torch.zeros(2, 1, 4, 4), few_step_levels(3), COND, one)
    assert asked == ["step 10", "step 11", "step 12"]
    assert torch.equal(found, torch.full((2, 1, 4, 4), 3.0))


def test_sampling_leaves_the_gradient_mode_alone() -> None:
    x_T = noise().requires_grad_()
    sample(DDIM(), Gaussian(), x_T, few_step_levels(3), COND).sum().backward()
    assert x_T.grad.abs().min() > 0
    with torch.no_grad():
        assert not sample(DDIM(), Gaussian(), x_T, few_step_levels(3), COND).requires_grad


def test_ddim_has_a_name() -> None:
    assert SOLVERS["ddim"] is DDIM
