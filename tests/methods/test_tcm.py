"""TCM: exact on pairs of the ODE, each half of f in its place, and its law of levels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gaussian import (
    COUNT,
    MEAN,
    SHAPE,
    STD,
    Exact,
    GaussianTask,
    Model,
    carried,
    end,
    fading,
    posterior,
)
from method_cases import case_of
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Prediction
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.diffusion.schedules import Schedule
from harness.methods import Batch
from harness.methods.parts.student import DenoisingStudent, flow_time, sigma_ve
from harness.methods.tcm import TCM, TCMConfig
from harness.tasks import Task


def gaussian(student: Exact, first: Exact, schedule: str = "vp", **options: Any) -> Any:
    """A method whose student and f_1 are formulas, with x_r on the ODE through x_t."""
    task = GaussianTask(schedule)
    with keyed_initialisation(0, "tcm"):
        teacher = Model(posterior, task.schedule)
        method = TCM(TCMConfig(**options), teacher, task, 1, 100)  # type: ignore[arg-type]
    method.model = Model(student, task.schedule)  # type: ignore[assignment]
    method.earlier = Model(first, task.schedule)  # type: ignore[assignment]
    before: list[tuple[Tensor, Tensor]] = []

    def noised(x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        if before:
            return carried(*before.pop(), t, method.schedule)
        x_t = DenoisingStudent.noised(method, x_0, eps, t)
        before.append((x_t, t))
        return x_t

    method.noised = noised  # type: ignore[method-assign]
    return method


def batch_of(step: int) -> Batch:
    index, keys = torch.arange(COUNT), Keyed("train", 0, step)
    data = (MEAN + STD * keys.normal("x", index, SHAPE)).double()
    return Batch(index, (data, Condition(torch.zeros(COUNT, dtype=torch.long))), None, keys)


def switched(below: Exact, above: Exact) -> Exact:
    """One formula below the noise level 1 and another above."""

    def formula(x: Tensor, t: Tensor, cond: Condition, schedule: Schedule) -> Prediction:
        high = (sigma_ve(schedule, t) >= 2 * STD - 1e-9).reshape(-1, 1, 1, 1)
        pair = [vars(each(x, t, cond, schedule)).values() for each in (above, below)]
        return Prediction(*(torch.where(high, a, b) for a, b in zip(*pair, strict=True)))

    return formula


@pytest.mark.parametrize("schedule", ["flow", "vp"])
def test_the_loss_is_0_at_the_end_of_the_ode(schedule: str) -> None:
    def loss(student: Exact, first: Exact) -> float:
        method = gaussian(student, first, schedule, huber_c=0.05)
        return float(method.truncated_loss(batch_of(0), step=99)[0].detach())

    exact = loss(end, end)
    assert exact < 1e-12
    # The student is not asked below the boundary, and f_1 not above.
    assert loss(switched(fading, end), switched(end, fading)) < 1e-12
    assert loss(fading, end) > 1e-4
    assert loss(end, fading) > 1e-4


def test_a_quarter_is_at_the_boundary_and_its_mean_is_weighted() -> None:
    method, batch = gaussian(end, end, uniform=0.0), batch_of(0)
    t, bound = method.noisy(batch)
    share = float(bound.double().mean())
    assert share == pytest.approx(0.25, abs=0.05)
    assert bool((t[bound] == method.lowest).all())
    assert bool((t >= method.lowest).all())
    losses = []
    for weight in (0.1, 1.1):
        method = gaussian(end, end, boundary_weight=weight, loss="l2")
        method.weight = lambda sigma_t, sigma_s: torch.ones_like(sigma_t)
        method.earlier.distortion.data[1] = 0.1  # moves f_1 by 0.1 tau
        losses.append(float(method.truncated_loss(batch, step=99)[0].detach()))
    r = method.before(torch.full((1,), method.lowest, dtype=torch.float64), 99)
    moved = 0.1 * float(flow_time(method.schedule, r))
    assert losses[1] - losses[0] == pytest.approx(share / 0.25 * moved**2, rel=1e-6)


def test_levels_follow_a_students_t_of_log_sigma() -> None:
    """Shares above some levels are those of the density's integral."""
    method = gaussian(end, end, schedule="flow", uniform=0.0, boundary_share=1e-9)
    found = torch.cat([method.noisy(batch_of(step))[0] for step in range(40)])
    sigma = sigma_ve(method.schedule, found).clamp(max=160)
    x = torch.linspace(0, math.log(160 / (2 * STD)) / 0.2, 200001, dtype=torch.float64)
    density = (1 + x.square() / 0.01) ** -0.505
    for level in (2.0, 10.0, 80.0):
        share = float(density[x > math.log(level / (2 * STD)) / 0.2].sum() / density.sum())
        assert float((sigma > level).double().mean()) == pytest.approx(share, rel=0.15)


def test_stage_two_starts_from_the_average_of_stage_one(tiny: Task, tmp_path: Any) -> None:
    case = case_of("tcm", tiny, tmp_path / "case")
    method = case.build()
    assert isinstance(method, TCM)
    trainer = case.trainer(method)
    trainer.train(until=method.start)
    average = method.student_player.ema.module.state_dict()  # type: ignore[union-attr]
    frozen = {k: v.clone() for k, v in method.earlier.network.state_dict().items()}
    now = method.student_player.module.state_dict()
    assert all(torch.equal(frozen[k], now[k]) and torch.equal(frozen[k], average[k]) for k in now)
    trainer.train()
    assert all(torch.equal(frozen[k], v) for k, v in method.earlier.network.state_dict().items())
    assert any(
        not torch.equal(frozen[k], v) for k, v in method.student_player.module.state_dict().items()
    )
    assert [u.phase for step in (0, method.start) for u in method.updates(step)] == [
        "",
        "truncated",
    ]
    assert method.rate(method.start / method.total_steps) == pytest.approx(0)


def test_steps_lie_between_pure_noise_and_the_boundary() -> None:
    task = GaussianTask("flow")
    teacher = Model(posterior, task.schedule)
    levels = [TCM(TCMConfig(), teacher, task, n, 10).levels.tolist() for n in (1, 2, 3)]  # type: ignore[arg-type]
    assert levels == [[1, 0], [1, 0.5, 0], [1, 0.75, 0.5, 0]]
