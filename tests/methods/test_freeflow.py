"""FreeFlow at its fixed points, and in which direction its two parts move samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gaussian import COUNT, Exact, Model, batches, built, jump, posterior, with_v
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Prediction
from harness.diffusion.schedules import Schedule
from harness.errors import UsageError

SCHEDULES = ["flow", "vp"]


def above(x: Tensor, t: Tensor, cond: Condition, schedule: Schedule) -> Prediction:
    """The denoiser of the data, moved up by 0.5."""
    alpha, _ = schedule.alpha_sigma(t)
    found = posterior(x - 0.5 * alpha.reshape(-1, 1, 1, 1), t, cond, schedule)
    return with_v(found.x_0 + 0.5, found.eps, t, schedule)


def g(formula: Exact, schedule: str, how: str, offset: float = 0.0, at: float | None = None) -> Any:
    """The prediction's residual, of a map to uniform times or to one, with an offset of U."""
    method = built("freeflow", formula, schedule, num_steps=1, derivative=how)
    method.model.distortion.data[1] = offset
    (batch,) = batches(1, schedule=schedule)
    assert batch.data is not None
    rho = batch.uniform("rho") if at is None else torch.full((COUNT,), at, dtype=torch.float64)
    z = method.noise(batch, "z").double()
    return method.prediction(z, rho * method.largest_tau, batch.data[1])[1]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("how", "bound"), [("jvp", 1e-6), ("difference", 1e-2)])
def test_the_prediction_is_exact_at_the_teachers_jumps(
    how: str, bound: float, schedule: str
) -> None:
    right, wrong = (g(formula, schedule, how).square().mean() for formula in (jump, posterior))
    assert float(right) < bound**2 * float(wrong)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_offset_is_taken_back(schedule: str) -> None:
    """A short jump ends nearly where it began, so g is the offset's negative."""
    found = g(jump, schedule, "jvp", offset=0.2, at=0.999)
    torch.testing.assert_close(found.detach(), torch.full_like(found, -0.2), atol=0.02, rtol=0)


def test_the_correction_moves_samples_from_the_fake_score_to_the_teacher() -> None:
    """Samples are `z - U`, so U rises where the fake score's data lie above."""
    (batch,) = batches(1)
    for fake, bounds in ((posterior, (-1e-12, 1e-12)), (above, (0.1, 10.0))):
        method = built("freeflow", jump, num_steps=1)
        method.matching.model = Model(fake, method.schedule)
        off = method.correction(batch)[1].detach()
        assert bounds[0] <= float(off.mean()) <= bounds[1]


def test_both_parts_have_equal_gradients() -> None:
    method = built("freeflow", jump, num_steps=1, correction=0.5)
    for correction, expected in ((2.0, 0.5 * 3.0), (0.0, 0.5 * 10.0)):
        method.end_step(0, {"student/prediction": 6.0, "student/correction": correction})
        assert method.ratio == expected
    other = built("freeflow", jump, num_steps=1)
    other.load_state_dict(method.state_dict())
    assert other.ratio == method.ratio


def test_it_takes_one_step() -> None:
    method = built("freeflow", num_steps=1)
    with pytest.raises(UsageError, match="num_steps is 4, but freeflow has one step: give 1"):
        type(method).check(method.config, method.task, 4)
