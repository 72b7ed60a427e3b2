"""PDD: exact at the teacher's own solver, heads that agree with their mean, and its grid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian import COUNT, SHAPE, GaussianTask, Model, posterior
from method_cases import case_of
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Denoiser, expand_to, predict
from harness.diffusion.randomness import Keyed
from harness.diffusion.schedules import schedule_of
from harness.errors import UsageError
from harness.methods import Batch
from harness.methods.parts.options import MethodConfig
from harness.methods.parts.student import time_of_flow, velocity
from harness.methods.pdd import PDD, PDDConfig, flow_grid
from harness.networks.backbones import build
from harness.networks.parallel import with_parallel_heads
from harness.runs.config import parse_options
from harness.tasks import Task

HEADS = 8


def gaussian(schedule: str, **options: Any) -> PDD:
    """The method on the Gaussian, with its exact denoiser as the teacher."""
    task = GaussianTask(schedule)
    config = PDDConfig(intervals=HEADS, **options)
    return PDD(config, Model(posterior, task.schedule), task, 2, 10)  # type: ignore[arg-type]


def rolled(method: PDD) -> Callable[..., Tensor]:
    """The velocities of the teacher's own solver on the grid, over any blocks of intervals."""

    def velocities(x_t: Tensor, t: Tensor, cond: Condition, first: Tensor, last: Tensor) -> Tensor:
        alpha, sigma = method.schedule.alpha_sigma(t)
        start = x_t / expand_to(alpha + sigma, x_t)
        n = (method.grid - t.unsqueeze(1)).abs().argmin(1)
        y, points = start.clone(), [start]
        for j in range(HEADS):  # every sample waits until the interval at which it starts
            k = torch.full_like(n, j)
            step = expand_to(method.taus[k + 1] - method.taus[k], y) * method.teachers(y, k, cond)
            y = torch.where((j >= n).reshape(-1, 1, 1, 1), y + step, y)
            points.append(y)
        path, rows = torch.stack(points), torch.arange(len(x_t))
        return torch.stack(
            [
                (path[b, rows] - path[a, rows]) / expand_to(method.taus[b] - method.taus[a], x_t)
                for a, b in zip(first, last, strict=True)
            ]
        )

    return velocities


def batch_of(step: int) -> Batch:
    index = torch.arange(COUNT)
    data = Keyed("data", 0, step).normal("x", index, SHAPE).double()
    cond = Condition(torch.zeros(COUNT, dtype=torch.long))
    return Batch(index, (data, cond), None, Keyed("train", 0, step))


@pytest.mark.parametrize("schedule", ["flow", "vp"])
@pytest.mark.parametrize("slope", ["euler", "midpoint"])
def test_the_loss_is_0_at_the_teachers_own_solver(
    schedule: str, slope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = gaussian(schedule, slope=slope, shift=3.0)
    exact = rolled(method)
    monkeypatch.setattr(method, "velocities", exact)
    assert float(method.loss(batch_of(0))[0]) < 1e-18
    monkeypatch.setattr(method, "velocities", lambda *args: 1.01 * exact(*args))
    assert float(method.loss(batch_of(0))[0]) > 1e-6


def test_blocks_start_at_few_places_and_every_interval_is_learnt() -> None:
    method = gaussian("flow", starts=4)
    n, k = method.blocks(batch_of(0))
    assert set(n.tolist()) == {0, 2, 4, 6}
    assert set(k[n == 4].tolist()) == {4, 5, 6, 7}
    short = gaussian("flow", starts=4, longest=0.5)
    n, k = short.blocks(batch_of(0))
    assert set((k - n)[n == 0].tolist()) == {0, 1, 2, 3}


def test_a_block_is_the_mean_of_its_heads_over_their_lengths() -> None:
    """One pass under several blocks gives what single heads give, weighted by their lengths."""
    lengths = torch.tensor([0.5, 0.3, 0.2])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = with_parallel_heads(build(GaussianTask.network_options), lengths)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        x = torch.randn(2, *SHAPE)
    time, labels = torch.tensor([900.0, 100.0]), torch.tensor([0, 0])

    def output(*blocks: tuple[int, int]) -> Tensor:
        first, last = (torch.tensor([b[i] for b in blocks for _ in range(2)]) for i in (0, 1))
        cond = Condition(labels).with_scalars(first=first, last=last)
        return network(x, time, cond).unflatten(0, (len(blocks), 2))

    single = output((0, 1), (1, 2), (2, 3))
    assert not torch.allclose(single[0], single[1])
    means = output((0, 2), (0, 3))
    torch.testing.assert_close(means[0], (0.5 * single[0] + 0.3 * single[1]) / 0.8)
    torch.testing.assert_close(means[1], (lengths.view(3, 1, 1, 1, 1) * single).sum(0))


def test_a_step_of_the_sampler_is_eulers_over_the_heads_of_its_block(
    tiny: Task, tmp_path: Path
) -> None:
    method = case_of("pdd", tiny, tmp_path).build()
    assert isinstance(method, PDD)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in method.student.network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    x, cond = tiny.evaluation_inputs(0, slice(2))
    student, (t, s) = method.student, method.levels[:2]
    assert isinstance(student, Denoiser)
    with torch.no_grad():
        found = method.solver.step(student, x, t, s, cond, None, None)[0]
        alpha, sigma = tiny.schedule.alpha_sigma(t)
        y = x / float(alpha + sigma)
        for j in range(16):  # half of the intervals
            edges = torch.tensor([float(j)] * 2), torch.tensor([float(j + 1)] * 2)
            told = cond.with_scalars(first=edges[0], last=edges[1])
            time = tiny.schedule.network_time(t).expand(2)
            output = student.network(x, time, told)[:, : x.shape[1]]
            head = velocity(predict(output, x, t, tiny.schedule, student.prediction_type))
            y = y + float(method.taus[j + 1] - method.taus[j]) * head
    alpha, sigma = tiny.schedule.alpha_sigma(s)
    torch.testing.assert_close(found, y * float(alpha + sigma), rtol=1e-4, atol=1e-4)


def test_the_grid_is_shifted_to_noise() -> None:
    grid = flow_grid(4, 5.0, 1.0)
    u = torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64)
    torch.testing.assert_close(grid, 5 * u / (1 + 4 * u))
    schedule = schedule_of("flow")
    torch.testing.assert_close(time_of_flow(schedule, flow_grid(4, 1.0, 1.0)), u)


@pytest.mark.parametrize(
    ("options", "num_steps", "problem"),
    [
        ({"intervals": 30, "starts": 4}, 1, "starts is 4, but must divide intervals, which is 30"),
        ({}, 3, "num_steps is 3, but must divide starts, which is 4"),
        ({"longest": 0.5}, 1, "longest is 0.5, but a block of 1 steps is 1 of all intervals"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: dict[str, Any], num_steps: int, problem: str, tiny: Task
) -> None:
    config: MethodConfig = parse_options("pdd", options)
    with pytest.raises(UsageError, match=problem):
        PDD.check(config, tiny, num_steps)
