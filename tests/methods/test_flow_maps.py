"""Flow maps at their fixed points, on a Gaussian with closed formulas, and in which direction."""

from __future__ import annotations

import pytest
import torch
from gaussian import batches, built, jump, posterior

from harness.methods.ayf import AYF

SCHEDULES = ["flow", "vp"]
OFFSET = 0.2
"""What is added to an exact mean velocity; its derivative is 0."""


# AYF


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ayfs_tangent_is_0_at_the_teachers_jumps(schedule: str) -> None:
    found = []
    for formula in (jump, posterior):
        method = built("ayf", formula, schedule, derivative="jvp")
        found += [
            float(method.loss_at(batch, r=1.0)[1]["tangent"].detach())
            for batch in batches(1, schedule=schedule)
        ]
    assert found[0] < 1e-12 * found[1]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ayf_takes_an_offset_back(schedule: str) -> None:
    """The tangent is -0.2 in 4 dimensions, of norm 0.4, and so -0.4 after normalisation by 0.5."""
    method = built("ayf", jump, schedule, derivative="jvp")
    method.model.distortion.data[1] = OFFSET
    (batch,) = batches(1, schedule=schedule)
    loss, _ = method.loss_at(batch, r=1.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.16, rel=1e-6)
    assert float(method.model.distortion.grad[1]) == pytest.approx(0.8, rel=1e-6)


def test_ayfs_derivative_counts_more_and_more() -> None:
    method = built("ayf", jump, ramp_steps=100)
    (batch,) = batches(1, size=64)
    losses = [next(iter(method.updates(step))).loss(batch)[0] for step in (0, 50, 100, 1000)]
    same = [method.loss_at(batch, r)[0] for r in (0.0, 0.495, 0.99, 0.99)]
    assert losses == same
    assert losses[0] > losses[1] > losses[2] > 0


def test_ayfs_lengths_are_logit_normal_and_places_uniform() -> None:
    method = built("ayf", schedule="flow", uniform=0.0, one_step=0.0)
    assert isinstance(method, AYF)
    (batch,) = batches(1, size=20_000)
    rho, tau = method.times(batch)
    lengths, places = tau - rho, rho / (1 - (tau - rho))
    at = torch.tensor([-1.8, -0.8, 0.2], dtype=torch.float64).sigmoid()  # mean -0.8, std 1
    below = torch.special.ndtr(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    found = torch.stack([(lengths <= x).double().mean() for x in at])
    torch.testing.assert_close(found, below, atol=0.015, rtol=0)
    assert float(places.mean()) == pytest.approx(0.5, abs=0.01)
