"""Consistency distillation: its exact fixed point, its grids, its sampler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Denoiser, expand_to
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.diffusion.schedules import SCHEDULES, VPSchedule
from harness.errors import UsageError
from harness.methods import METHODS, Batch
from harness.methods.consistency import karras_levels
from harness.methods.parts.samplers import ConsistencySteps
from harness.solvers import SOLVERS, sample
from harness.tasks import Task, load_task

CPU = torch.device("cpu")
EVERYONE = Condition(torch.zeros(1, dtype=torch.long))


def method_of(task: Task, num_steps: int = 1, **options: Any) -> Any:
    cls = METHODS["consistency-distillation"]
    with keyed_initialisation(0, "consistency"):
        return cls(cls.Config(**options), task.teacher(CPU), task, num_steps, 10)


class RestOfThePath(nn.Module):
    """The exact consistency map as a network.

    Its x_0-prediction is the end point of the teacher's remaining steps on a grid.
    """

    def __init__(self, method: Any):
        super().__init__()
        self.method, self.schedule = method, method.task.schedule

    def forward(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        out = torch.empty_like(x)
        for i, level in enumerate(time.double()):
            t = (level + 1) / 1000
            start = int((self.method.grid - t).abs().argmin())
            end = sample(
                self.method.teacher_solver,
                self.method.teacher,
                x[i : i + 1],
                self.method.grid[start:],
                cond[i : i + 1],
            )
            alpha, sigma = (
                expand_to(c, x[:1]) for c in self.schedule.alpha_sigma(self.method.grid[start])
            )
            out[i] = ((x[i : i + 1] - alpha * end) / sigma.clamp(min=1e-9))[0]
        return out


@pytest.mark.parametrize("options", [{}, {"grid": "karras", "grid_levels": 6}, {"solver": "heun"}])
def test_at_the_exact_map_the_loss_is_zero(options: dict[str, Any], tiny: Task) -> None:
    method = method_of(tiny, loss="l2", **options)
    index = torch.arange(16)
    batch = Batch(index, tiny.split.train.batch(index), None, Keyed("train", 0, 0))
    untrained = float(method.loss(batch)[0].detach())
    exact = RestOfThePath(method)
    method.target_model.network = method.model.network = exact
    with torch.no_grad():
        found = float(method.loss(batch)[0])
    assert found < 1e-4 * untrained


def test_the_grid_is_the_tasks_or_karras(tiny: Task) -> None:
    assert method_of(tiny).grid.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    grid = karras_levels(18, VPSchedule())
    assert len(grid) == 19
    assert grid[0] == 1
    assert grid[-1] == 0
    assert bool((grid.diff() < 0).all())
    alpha, sigma = VPSchedule().alpha_sigma(grid[:-1])
    roots = (sigma / alpha) ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(17), rtol=1e-3, atol=0)
    assert float(sigma[-1] / alpha[-1]) == pytest.approx(0.002, rel=1e-6)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_time_of_a_noise_level(name: str) -> None:
    schedule = SCHEDULES[name]()
    t = torch.tensor(
        [0.0002, 0.001, 0.0123, 0.25, 0.5005, 0.999, 1.0 if name == "vp" else 0.9999],
        dtype=torch.float64,
    )
    alpha, sigma = schedule.alpha_sigma(t)
    torch.testing.assert_close(schedule.time_of(sigma / alpha), t, rtol=1e-9, atol=1e-12)


def test_a_perfect_student_ends_where_the_tasks_trajectories_end(tiny: Task) -> None:
    method = method_of(tiny)
    x_T, cond = tiny.evaluation_inputs(0)
    end = sample(SOLVERS["ddim"](), tiny.teacher(CPU), x_T[:3], method.grid, cond[:3])
    student = Denoiser(RestOfThePath(method), tiny.schedule, tiny.prediction_type)
    found = sample(ConsistencySteps(), student, x_T[:3], method.levels, cond[:3])
    torch.testing.assert_close(found, end, rtol=1e-3, atol=1e-3)


def test_untrained_its_first_step_is_the_teachers_prediction(tiny: Task) -> None:
    method = method_of(tiny)
    x_T, cond = tiny.evaluation_inputs(0)
    expected = tiny.teacher(CPU).denoiser(x_T[:3], torch.tensor(1.0), cond[:3]).x_0
    found = sample(method.solver, method.student, x_T[:3], method.levels, cond[:3])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_several_steps_draw_fresh_noise_by_name(tiny: Task) -> None:
    method = method_of(tiny, num_steps=4)
    x_T, cond = tiny.evaluation_inputs(0)
    names = []

    def noise(name: str) -> Tensor:
        names.append(name)
        return torch.zeros(3, *tiny.shape)

    x = x_T[:3]
    found = sample(method.solver, method.student, x, method.levels, cond[:3], noise)
    assert names == ["step 1", "step 2", "step 3"]
    for t, s in zip(method.levels[:-1], method.levels[1:], strict=True):
        x = expand_to(tiny.schedule.alpha_sigma(s)[0], x) * method.student(x, t, cond[:3]).x_0
    torch.testing.assert_close(found, x)


def test_the_target_follows_the_student(tiny: Task) -> None:
    method = method_of(tiny, target_half_life=1.0)
    with torch.no_grad():
        for parameter in method.players["student"].module.parameters():
            parameter.add_(1.0)
    before = {name: value.clone() for name, value in method.target_ema.module.named_parameters()}
    method.end_step(0, {})
    for name, value in method.target_ema.module.named_parameters():
        torch.testing.assert_close(value, before[name] + 0.5, msg=name)


def test_the_target_starts_where_the_student_does(tiny: Task) -> None:
    method, other = method_of(tiny), method_of(tiny)
    other.start_from(
        {key: value + 1 for key, value in method.target_ema.module.state_dict().items()}
    )
    for key, value in other.target_ema.module.state_dict().items():
        assert torch.equal(value, method.target_ema.module.state_dict()[key] + 1)


def test_levels_off_the_grid_are_refused(tiny: Task) -> None:
    cls = METHODS["consistency-distillation"]
    with pytest.raises(UsageError, match="must divide the 4 levels"):
        cls.check(cls.Config(), tiny, 3)
    cls.check(cls.Config(grid="karras"), tiny, 3)
    with pytest.raises(UsageError, match="the grid has 2 levels"):
        cls.check(cls.Config(grid="karras", grid_levels=2), tiny, 3)


def test_karras_grid_is_sampled_where_it_was_trained(tiny: Task) -> None:
    cls = METHODS["consistency-distillation"]
    for steps in (1, 3, 6):
        method = cls(cls.Config(grid="karras", grid_levels=6), tiny.teacher(CPU), tiny, steps, 10)
        assert len(method.levels) == steps + 1
        assert set(method.levels.tolist()) <= set(method.grid.tolist())
        assert bool((method.levels.diff() < 0).all())
        assert (method.levels[0], method.levels[-1]) == (1, 0)
    alpha, sigma = tiny.schedule.alpha_sigma(method.grid[-2])
    assert float(sigma / alpha) == pytest.approx(0.004 * tiny.data_std, rel=1e-6)


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_an_exact_teacher_has_a_finite_loss(solver: str) -> None:
    """It has no noise to predict at t = 0, where a second evaluation would ask it."""
    task = load_task("mixture")
    method = method_of(task, solver=solver)
    index = torch.arange(200)
    batch = Batch(index, task.split.train.batch(index), None, Keyed("train", 0, 0))
    assert bool(method.loss(batch)[0].isfinite())


def test_heun_takes_a_time_for_each_sample(tiny: Task) -> None:
    teacher, solver = tiny.teacher(CPU).double(), SOLVERS["heun"]()
    x, cond = (part[:3] for part in tiny.evaluation_inputs(0))
    x = x.double()
    t, s = (
        torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64),
        torch.tensor([0.7, 0.2, 0.0], dtype=torch.float64),
    )
    together = solver.step(teacher, x, t, s, cond, None, None)[0]
    for i in range(3):
        alone = solver.step(teacher, x[i : i + 1], t[i], s[i], cond[i : i + 1], None, None)[0]
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=1e-9)


def test_pseudo_huber(tiny: Task) -> None:
    off, c = torch.zeros(2, 1, 8, 8), 0.00054 * 8
    off[1, 0, 0, :4] = 1.0
    torch.testing.assert_close(
        method_of(tiny).config.distance(off), torch.tensor([0.0, (4 + c * c) ** 0.5 - c])
    )
    torch.testing.assert_close(
        method_of(tiny, loss="l2").config.distance(off), torch.tensor([0.0, 1 / 16])
    )
