"""The search for levels, and samplers that use them.

It beats equal spacing and is as good as trying everything.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Prediction
from harness.diffusion.schedules import FlowSchedule, Schedule, VPSchedule, few_step_levels
from harness.errors import UsageError
from harness.methods import METHODS
from harness.runs.config import RunConfig
from harness.runs.resolve import resolve
from harness.runs.teacher_training import search
from harness.solvers import SOLVERS, Trajectory, sample, trace
from harness.solvers.search import search_levels
from harness.tasks import Task

CPU = torch.device("cpu")


class Gaussian:
    """The exact denoiser of data N(0.3, 0.5^2)."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        alpha, sigma = self.schedule.alpha_sigma(t)
        score = (x_t - alpha * 0.3) / (alpha**2 * 0.25 + sigma**2)
        return Prediction(0.3 + alpha * 0.25 * score, sigma * score, score)


def path(model: Gaussian, steps: int) -> Trajectory:
    noise = torch.randn(
        32, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    cond = Condition(torch.zeros(32, dtype=torch.long))
    return trace(SOLVERS["ddim"](), model, noise, few_step_levels(steps), cond)


@pytest.mark.parametrize("schedule", [VPSchedule(), FlowSchedule()], ids=["vp", "flow"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_search_finds_the_best_of_all_levels(schedule: Schedule, steps: int) -> None:
    model, solver = Gaussian(schedule), SOLVERS["ddim"]()
    full = path(model, 10)

    def mse(places: tuple[int, ...]) -> float:
        end = sample(solver, model, full.states[:, 0], full.levels[[0, *places, 10]], full.cond)
        return float((end - full.states[:, -1]).square().mean())

    found = search_levels(solver, model, full, steps)
    assert found.mse == pytest.approx(
        min(map(mse, itertools.combinations(range(1, 10), steps - 1)))
    )
    assert found.equal_mse == pytest.approx(mse(tuple(10 * i // steps for i in range(1, steps))))
    assert (found.mse < found.equal_mse) == (steps > 1)
    assert len(found.levels) == steps + 1


def test_as_many_steps_as_the_grid_has_leave_no_choice() -> None:
    full = path(Gaussian(VPSchedule()), 6)
    found = search_levels(SOLVERS["ddim"](), Gaussian(VPSchedule()), full, 6)
    assert torch.equal(found.levels, full.levels)
    assert found.mse == 0
    with pytest.raises(ValueError, match="only 6 steps"):
        search_levels(SOLVERS["ddim"](), Gaussian(VPSchedule()), full, 7)


def test_a_sampler_on_found_levels_ends_as_the_search_says(tiny: Task) -> None:
    found = search(tiny, "ddim", 2, 16, CPU)
    levels = [round(1000 * float(level)) for level in found.levels[1:-1]]
    method = METHODS["teacher"](
        METHODS["teacher"].Config(levels=levels), tiny.teacher(CPU), tiny, 2, 0
    )
    assert torch.equal(method.levels, found.levels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": [500, 750]}, "4 steps have 3 levels between noise and data, but 2 are given"),
        ({"levels": [250, 500, 1000]}, "levels hold 1000, but must lie between 0 and 1000"),
        ({"levels": [0, 250, 500]}, "greater than or equal to 1"),
    ],
)
def test_levels_that_do_not_fit_are_refused(
    options: dict[str, Any], message: str, tiny_folder: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(RunConfig(method="teacher", task="tiny", num_steps=4, options=options))


def test_equally_spaced_levels_name_the_same_run(tiny_folder: Path) -> None:
    ids = [
        resolve(RunConfig(method="teacher", task="tiny", num_steps=4, options=options)).run_id
        for options in (
            {},
            {"levels": "250,500,750"},
            {"levels": [750, 500, 250]},
            {"levels": [250, 500, 800]},
        )
    ]
    assert ids[0] == ids[1] == ids[2] != ids[3]


@pytest.mark.parametrize(
    ("solver", "num_steps", "message"),
    [("dddim", 2, "did you mean ddim"), ("ddim", 5, "give 1 to 4")],
)
def test_searches_that_cannot_be_are_refused(
    solver: str, num_steps: int, message: str, tiny: Task
) -> None:
    with pytest.raises(UsageError, match=message):
        search(tiny, solver, num_steps, 4, CPU)
