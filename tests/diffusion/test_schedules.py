"""The variance-preserving schedule against its definition, and the grids of levels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.diffusion.schedules import (
    GRIDS,
    FlowSchedule,
    Schedule,
    VPSchedule,
    few_step_levels,
    respaced_levels,
    schedule_of,
)
from harness.errors import UsageError

SCHEDULE = VPSchedule()
LEVELS = torch.arange(1, 1001, dtype=torch.float64) / 1000
schedules = pytest.mark.parametrize(
    "schedule", [SCHEDULE, FlowSchedule(), FlowSchedule(3.0)], ids=["vp", "flow", "flow-3"]
)
ALPHA_SQUARED = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def log_snr(t: Tensor) -> Tensor:
    """log(alpha^2 / sigma^2) at timesteps t."""
    alpha, sigma = SCHEDULE.alpha_sigma(t)
    return 2 * (alpha / sigma).log()


def test_levels_are_the_closed_product() -> None:
    alpha, sigma = SCHEDULE.alpha_sigma(LEVELS)
    np.testing.assert_allclose(alpha, np.sqrt(ALPHA_SQUARED), rtol=1e-10)
    np.testing.assert_allclose(sigma, np.sqrt(1 - ALPHA_SQUARED), rtol=1e-10)


def test_the_last_level_is_almost_noise() -> None:
    alpha, _ = SCHEDULE.alpha_sigma(torch.tensor(1.0))
    assert float(alpha) == pytest.approx(0.00635, abs=5e-6)


def test_variance_is_preserved() -> None:
    alpha, sigma = SCHEDULE.alpha_sigma(torch.linspace(0, 1, 3001, dtype=torch.float64))
    torch.testing.assert_close(
        alpha**2 + sigma**2, torch.ones(3001, dtype=torch.float64), rtol=0, atol=1e-14
    )


def test_signal_to_noise_falls_everywhere() -> None:
    assert (log_snr(torch.linspace(1e-5, 1, 7001, dtype=torch.float64)).diff() < 0).all()


def test_zero_is_clean() -> None:
    alpha, sigma = SCHEDULE.alpha_sigma(torch.zeros(2))
    assert alpha.tolist() == [1, 1]
    assert sigma.tolist() == [0, 0]


def test_below_the_first_level_sigma_is_a_line_to_zero() -> None:
    _, sigma = SCHEDULE.alpha_sigma(torch.tensor([0.00025, 0.0005, 0.001], dtype=torch.float64))
    np.testing.assert_allclose(sigma, 0.01 * np.array([0.25, 0.5, 1]), rtol=1e-9)  # beta_0 = 1e-4


def test_between_levels_log_snr_is_a_line() -> None:
    at = log_snr(LEVELS)
    torch.testing.assert_close(
        log_snr(LEVELS[:-1] + 0.25 / 1000), torch.lerp(at[:-1], at[1:], 0.25), rtol=0, atol=1e-9
    )


def test_flow_is_a_line_from_data_to_noise() -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    alpha, sigma = FlowSchedule().alpha_sigma(t)
    assert alpha.tolist() == [1, 0.75, 0]
    assert sigma.tolist() == FlowSchedule().network_time(t).tolist() == t.tolist()


def test_a_shift_moves_equal_steps_to_noise() -> None:
    """Esser et al. 2024, arXiv 2403.03206, eq. 23: at t = 1/2, 3/4 for a shift of 3."""
    schedule, t = FlowSchedule(3.0), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert schedule.alpha_sigma(t)[1].tolist() == [0, 0.5, 0.75, 0.9, 1]
    assert schedule.network_time(t).tolist() == pytest.approx([0, 0.5, 0.75, 0.9, 1])


def test_a_name_may_have_a_shift() -> None:
    t = torch.tensor([0.1, 0.6])
    for name, same in (("flow-3", FlowSchedule(3.0)), ("flow-1", FlowSchedule()), ("vp", SCHEDULE)):
        found = schedule_of(name).alpha_sigma(t)
        assert all(map(torch.equal, found, same.alpha_sigma(t)))


@pytest.mark.parametrize("name", ["flow-0", "flow--1", "flow-three", "flow-inf", "flow-nan"])
def test_a_shift_that_is_no_number_above_zero_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"schedule is {name}, but a shift must be above 0"):
        schedule_of(name)


@pytest.mark.parametrize("name", ["flows", "vp-3", "edm"])
def test_another_schedule_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"unknown schedule '{name}'"):
        schedule_of(name)


@schedules
def test_any_shape_gives_float64_of_that_shape(schedule: Schedule) -> None:
    for t in (torch.tensor(0.5), torch.full((2, 3), 0.5)):
        for values in (*schedule.alpha_sigma(t), *schedule.derivatives(t)):
            assert values.shape == t.shape
            assert values.dtype == torch.float64


@schedules
def test_derivatives_are_those_of_alpha_and_sigma(schedule: Schedule) -> None:
    t, h = LEVELS[:-1] + 0.5 / 1000, 1e-6  # between levels, where the schedule is smooth
    differences = [
        (above - below) / (2 * h)
        for above, below in zip(
            schedule.alpha_sigma(t + h), schedule.alpha_sigma(t - h), strict=True
        )
    ]
    for found, expected in zip(schedule.derivatives(t), differences, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_the_network_is_told_the_level() -> None:
    time = SCHEDULE.network_time(LEVELS)
    assert time.dtype == torch.float32
    assert torch.equal(time, torch.arange(1000, dtype=torch.float32))


def test_few_step_levels_of_four() -> None:
    assert torch.equal(
        SCHEDULE.network_time(few_step_levels(4)[:-1]), torch.tensor([999.0, 749.0, 499.0, 249.0])
    )


def test_respaced_levels_are_dits() -> None:
    """Those of 25 steps, whose 1st, 11th, 16th and 21st ARD's released code uses."""
    levels = SCHEDULE.network_time(respaced_levels(25)[:-1])
    expected = [round(i * 999 / 24) for i in range(24, -1, -1)]
    torch.testing.assert_close(levels, torch.tensor(expected).float(), rtol=0, atol=1e-3)
    torch.testing.assert_close(levels[[0, 10, 15, 20]], torch.tensor([999.0, 583, 375, 166]))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("steps", [2, 3, 7, 24, 1000])
def test_levels_fall_from_noise_to_data(steps: int, grid: str) -> None:
    levels = GRIDS[grid](steps)
    assert levels.dtype == torch.float64
    assert len(levels) == steps + 1
    assert levels[0] == 1
    assert levels[-1] == 0
    assert (levels.diff() < 0).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8, 12])
def test_a_students_levels_are_levels_of_the_trajectory(steps: int) -> None:
    assert torch.equal(few_step_levels(steps), few_step_levels(24)[:: 24 // steps])
