"""Flow maps at their fixed points, on a Gaussian with closed formulas, and in which direction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gaussian import STD, Exact, Model, batches, built, end, jump, largest_z, posterior
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.randomness import Keyed
from harness.errors import UsageError
from harness.methods import Batch
from harness.methods.ayf import AYF
from harness.methods.imf import IMF, INSTANTANEOUS, IMFConfig
from harness.methods.tvm import TVM, TVMConfig
from harness.tasks import Task

SCHEDULES = ["flow", "vp"]
CPU = torch.device("cpu")
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


# iMF


def imf(schedule: str, velocity: str = "head", formula: Exact = jump, **options: Any) -> IMF:
    """The method with a map as its mean velocity, and the exact instantaneous velocity."""
    method: IMF = built("imf", formula, schedule, velocity=velocity, **options)

    def velocities(y: Tensor, rho: Tensor, tau: Tensor, cond: Condition, *heads: int) -> Tensor:
        exact = method.u(y, tau, tau, cond, Model(posterior, method.schedule))  # type: ignore[arg-type]
        both = method.u(y, rho, tau, cond), exact
        return torch.stack([both[head] for head in heads])

    method.velocities = velocities  # type: ignore[method-assign]
    return method


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("velocity", ["head", "boundary"])
def test_imfs_compound_is_the_flows_velocity(velocity: str, schedule: str) -> None:
    method = imf(schedule, velocity)
    (batch,) = batches(1, size=64, schedule=schedule)
    assert batch.data is not None
    y, cond = batch.data
    tau = torch.linspace(0.1, 0.9, 64, dtype=torch.float64)
    v = method.velocities(y, tau, tau, cond, INSTANTANEOUS)[0]
    for share in (0.0, 0.5, 0.9):
        found = method.compound(y, share * tau, tau, v, cond)
        assert len(found) == (2 if velocity == "head" else 1)
        for each in found:
            torch.testing.assert_close(each, v, atol=1e-4, rtol=0)
        wrong = method.compound(y, share * tau, tau, -v, cond)[0]
        assert float((wrong - v).detach().abs().max()) > 0.01


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_imfs_loss_has_the_floor_of_the_datas_velocities(schedule: str) -> None:
    """Var(eps - x_0 | y) is `std^2 / ((1 - tau)^2 std^2 + tau^2)` in each dimension."""
    (batch,) = batches(1, size=4096, schedule=schedule)
    method = imf(schedule)
    _, tau = method.spread(batch, method.config.pair(batch), method.config.distinct)
    floor = float((STD**2 / ((1 - tau) ** 2 * STD**2 + tau**2)).mean())
    metrics = method.loss(batch)[1]
    assert float(metrics["mse"]) == pytest.approx(floor, rel=0.05)
    assert float(metrics["mse_v"]) == pytest.approx(floor, rel=0.05)
    assert float(imf(schedule, formula=end).loss(batch)[1]["mse"]) > 1.2 * floor


def test_imf_leaves_no_mean_gradient_at_its_fixed_point() -> None:
    for formula, bounds in ((jump, (0, 4)), (end, (8, 1e9))):
        method = imf("flow", "boundary", formula, power=0.0)
        assert bounds[0] <= largest_z(method, method.loss, count=12) < bounds[1]


def test_imfs_guidance_has_its_scale_as_a_fixed_point(tiny: Task) -> None:
    """Where v is guided by the scale that it is told, the data's velocity is guided to the same."""
    method = IMF(IMFConfig(guidance_to=4.0), tiny.teacher(CPU), tiny, 2, 10)
    index, null, conditional = torch.arange(64), 0.3, 0.8
    labels = tiny.split.train.batch(index)[1]
    batch, dropped = Batch(index, None, None, Keyed("test", 0)), index >= 60
    cond = method.with_scales(batch, labels.replaced(dropped, tiny.null), dropped)
    scale = 1 / (1 - cond.scalars["guidance"] / 1000).reshape(-1, 1, 1, 1)
    assert float(scale.min()) == 1 < 3 < float(scale.max()) <= 4

    def v(y: Tensor, tau: Tensor, cond: Condition) -> Tensor:
        unlabelled = (cond.classes == int(tiny.null.classes)).reshape(-1, 1, 1, 1)
        assert bool((cond.scalars["guidance"][unlabelled.flatten()] == 0).all())
        return torch.where(unlabelled, null, null + scale * (conditional - null)).expand_as(y)

    method.v = v  # type: ignore[method-assign]
    data = torch.full((64, 1, 8, 8), conditional)
    found, own = method.guided_velocity(data, data, torch.full((64,), 0.5), cond)
    torch.testing.assert_close(found[:60], own[:60])
    torch.testing.assert_close(found[60:], data[60:])
    told = method.solver.scalars(torch.tensor(1.0), torch.tensor(0.0))  # type: ignore[attr-defined]
    assert float(told["guidance"]) == pytest.approx(1000 * (1 - 1 / tiny.guidance_scale))
    with pytest.raises(UsageError, match=r"guidance_to is 1, but the task's scale is 1.25"):
        IMF.check(IMFConfig(guidance_to=1.0), tiny, 1)


# TVM


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_end_of_an_exact_jump_moves_with_the_flow(schedule: str) -> None:
    found = [
        float(built("tvm", formula, schedule).loss(batch)[1]["terminal"].detach())
        for formula in (jump, posterior)
        for batch in batches(1, schedule=schedule)
    ]
    assert found[0] < 1e-7 * found[1]


def test_tvm_leaves_no_mean_gradient_at_its_fixed_point() -> None:
    for formula, bounds in ((jump, (0, 4)), (posterior, (8, 1e9))):
        method = built("tvm", formula, "flow")
        assert bounds[0] <= largest_z(method, method.loss, count=12) < bounds[1]


@pytest.mark.parametrize("how", ["jvp", "difference"])
def test_tvms_gradient_flows_through_the_derivative(how: str) -> None:
    """It is that of the moved end, by differences in the distortion."""
    method = built("tvm", jump, "flow", derivative=how)
    (batch,) = batches(1, size=64, schedule="flow")
    y, cond = batch.data  # type: ignore[misc]
    tau = torch.linspace(0.2, 0.9, 64, dtype=torch.float64)
    weights = method.model.distortion

    def moved(by: float) -> Tensor:
        weights.data[0] = 0.1 + by
        return method.end(y, 0.5 * tau, tau, cond)[1].mean()

    moved(0.0).backward()
    expected = (moved(1e-3) - moved(-1e-3)).detach() / 2e-3
    assert float(weights.grad[0]) == pytest.approx(float(expected), rel=0.01)
    weights.grad = None
    (method.u(y, 0.5 * tau, tau, cond)).mean().backward()  # without the derivative's part
    assert float(weights.grad[0]) != pytest.approx(float(expected), rel=0.05)


def test_tvms_steps_from_noise_end_anywhere() -> None:
    (batch,) = batches(1, size=4096)
    method = built("tvm", schedule="flow", one_step=1.0)
    rho, tau, _ = method.times(batch)
    assert bool((tau == method.last_tau).all())
    assert float(rho.min()) < 0.05 < 0.9 < float(rho.max())
    method = built("tvm", schedule="flow", one_step=0.0, uniform=0.0)
    rho, tau, matched = method.times(batch)
    middle = float(torch.tensor(-0.8).sigmoid())
    assert float((tau - rho).median()) == pytest.approx(middle, abs=0.02)
    assert float(matched.median()) == pytest.approx(float(torch.tensor(-0.4).sigmoid()), abs=0.02)
    assert float(tau.max()) < 1
    assert float(rho.median()) < 0.95 * float(matched.median())  # the same law, cut


def test_tvms_velocities_are_guided_where_there_is_a_label(tiny: Task) -> None:
    method = TVM(TVMConfig(), tiny.teacher(CPU), tiny, 2, 10)
    assert method.target == "guided data"
    labels = tiny.split.train.batch(torch.arange(2))[1]
    method.averages = lambda y, tau, cond: torch.full_like(y, 0.3)  # type: ignore[method-assign]
    v, tau = torch.full((2, 1, 8, 8), 0.8), torch.full((2,), 0.5)
    found = method.guided(v, v, tau, labels, torch.tensor([1.25, 1.0]))
    assert found[:, 0, 0, 0].tolist() == pytest.approx([0.3 + 1.25 * 0.5, 0.8])
