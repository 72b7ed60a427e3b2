"""Every solver's order of convergence and number of evaluations.

The order is measured against the exact ODE of a Gaussian, under both schedules.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Prediction
from harness.diffusion.schedules import FlowSchedule, Schedule, VPSchedule
from harness.solvers import SOLVERS, sample

MEAN, DEVIATION = 0.3, 0.5
COND = Condition(torch.zeros(64, dtype=torch.long))
ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpm-solver++2m": 2, "dpm-solver++3m": 3, "unipc": 3}
HISTORY = {"dpm-solver++3m": 2, "unipc": 1}  # steps taken before the order is reached


class Gaussian:
    """The exact denoiser of data N(mu, s^2), and the exact ODE."""

    def __init__(self, schedule: Schedule):
        self.schedule, self.calls = schedule, 0

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        self.calls += 1
        alpha, sigma = self.schedule.alpha_sigma(t)
        score = (x_t - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2)
        x_0, eps = MEAN + alpha * DEVIATION**2 * score, sigma * score
        return Prediction(x_0, eps, torch.full_like(eps, torch.nan))  # no solver asks for v

    def carried(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The exact solution at s from x at t: the standardised x does not change."""
        (a, sigma), (b, sigma_s) = (self.schedule.alpha_sigma(level) for level in (t, s))
        z = (x - a * MEAN) / (a**2 * DEVIATION**2 + sigma**2).sqrt()
        return b * MEAN + (b**2 * DEVIATION**2 + sigma_s**2).sqrt() * z


def errors(name: str, schedule: Schedule, steps: list[int]) -> list[float]:
    noise, found = (
        torch.randn(64, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        [],
    )
    for n in steps:
        model, levels, solver = (
            Gaussian(schedule),
            torch.linspace(0.9, 0.1, n + 1, dtype=torch.float64),
            SOLVERS[name](),
        )
        started, state, x = HISTORY.get(name, 0), None, noise
        for i, (t, s) in enumerate(
            pairwise(levels)
        ):  # as `sample` does, from a history that lies on the exact path
            x = model.carried(noise, levels[0], t) if i <= started else x
            x, _, state = solver.step(model, x, t, s, COND, state, None)
        found.append(float((x - model.carried(noise, levels[0], levels[-1])).abs().max()))
    return found


def test_every_registered_solver_has_a_stated_order() -> None:
    assert set(SOLVERS.names()) == set(ORDERS)


@pytest.mark.parametrize("name", ORDERS)
def test_order_under_the_flow_schedule(name: str) -> None:
    steps = [10, 20, 40, 80] if ORDERS[name] < 3 else [40, 80, 160, 320]
    fitted = -np.polyfit(np.log(steps), np.log(errors(name, FlowSchedule(), steps)), 1)[0]
    assert ORDERS[name] - 0.2 < fitted < ORDERS[name] + 0.3


@pytest.mark.parametrize("name", ORDERS)
def test_order_under_the_vp_schedule(name: str) -> None:
    """The VP schedule's log-SNR is piecewise linear between levels.

    A higher order therefore shows only while steps are much longer than a level.
    """
    steps = [10, 20, 40] if ORDERS[name] < 3 else [40, 80, 160, 320]
    found = errors(name, VPSchedule(), steps)
    fitted = -np.polyfit(np.log(steps), np.log(found), 1)[0]
    assert fitted > ORDERS[name] - (0.2 if ORDERS[name] < 3 else 0.4)
    if ORDERS[name] > 1:
        assert found[-1] < errors("ddim", VPSchedule(), steps[-1:])[0] / 5


def test_euler_is_ddim_under_the_flow_schedule_alone() -> None:
    both = [errors(name, FlowSchedule(), [10])[0] for name in ("euler", "ddim")]
    assert both[0] == pytest.approx(both[1], rel=1e-5)
    both = [errors(name, VPSchedule(), [10])[0] for name in ("euler", "ddim")]
    assert abs(both[0] - both[1]) > 0.1 * both[1]


@pytest.mark.parametrize("schedule", [VPSchedule(), FlowSchedule()], ids=["vp", "flow"])
def test_derivatives_equal_finite_differences(schedule: Schedule) -> None:
    t, h = torch.tensor([0.1005, 0.4005, 0.9005], dtype=torch.float64), 1e-6
    for derivative, above, below in zip(
        schedule.derivatives(t),
        schedule.alpha_sigma(t + h),
        schedule.alpha_sigma(t - h),
        strict=True,
    ):
        torch.testing.assert_close(derivative, (above - below) / (2 * h), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "evaluations"),
    [
        ("ddim", 4),
        ("euler", 4),
        ("heun", 7),
        ("dpm-solver++2m", 4),
        ("dpm-solver++3m", 4),
        ("unipc", 4),
    ],
)
def test_evaluations_from_noise_to_data(name: str, evaluations: int) -> None:
    model, noise = (
        Gaussian(VPSchedule()),
        torch.randn(64, 1, 1, 1, generator=torch.Generator().manual_seed(0)),
    )
    out = sample(SOLVERS[name](), model, noise, torch.linspace(1, 0, 5, dtype=torch.float64), COND)
    assert model.calls == evaluations
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("name", ORDERS)
def test_the_flow_schedules_ends_are_finite(name: str) -> None:
    """alpha = 0 at t = 1 and sigma = 0 at t = 0, where log-SNR is infinite."""
    noise = torch.randn(
        64, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    model = Gaussian(FlowSchedule())
    out = sample(SOLVERS[name](), model, noise, torch.linspace(1, 0, 41, dtype=torch.float64), COND)
    assert float((out - (MEAN + DEVIATION * noise)).abs().max()) < (
        0.1 if ORDERS[name] == 1 else 0.02
    )
