"""Feature caching in the teacher: what is reused, and what it saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harness.diffusion.counting import count_flops
from harness.errors import UsageError
from harness.methods import METHODS
from harness.networks.passes import count_passes
from harness.runs.config import RunConfig
from harness.runs.resolve import resolve
from harness.solvers import SOLVERS, FeatureReuse, sample
from harness.tasks import Task

CPU = torch.device("cpu")


def measured(task: Task, num_steps: int = 4, **options: Any) -> tuple[Tensor, float, int]:
    """Samples of the teacher, its passes a sample and the FLOPs of a sample."""
    cls = METHODS["teacher"]
    method = cls(cls.Config(**options), task.teacher(CPU), task, num_steps, 0)
    x_T, cond = task.evaluation_inputs(0)

    def run(count: int = 3) -> Tensor:
        with torch.no_grad():
            return sample(method.solver, method.student, x_T[:count], method.levels, cond[:count])

    with count_passes(method.sampled_network) as passes:
        images = run()
    return images, passes.total / 3, count_flops(lambda: run(1))


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm-solver++2m", "unipc"])
def test_reuse_keeps_the_passes_and_saves_work(solver: str, tiny: Task) -> None:
    plain, reused = (
        measured(tiny, solver=solver),
        measured(tiny, solver=solver, reuse_every=2, reuse_below=1),
    )
    assert plain[1] == reused[1]
    assert reused[2] < 0.8 * plain[2]
    assert float((plain[0] - reused[0]).abs().max()) > 1e-4
    assert bool(reused[0].isfinite().all())


def test_every_step_full_is_the_solver_alone(tiny: Task) -> None:
    teacher, (x_T, cond) = tiny.teacher(CPU), tiny.evaluation_inputs(0)
    levels = METHODS["teacher"](METHODS["teacher"].Config(), teacher, tiny, 4, 0).levels
    with torch.no_grad():
        both = [
            sample(s, teacher, x_T[:3], levels, cond[:3])
            for s in (SOLVERS["ddim"](), FeatureReuse(SOLVERS["ddim"](), 1, 1))
        ]
    assert torch.equal(both[0], both[1])


def test_a_step_that_reuses_adds_what_the_last_full_one_added(tiny: Task) -> None:
    """By hand: this step's lowest block plus what the upper blocks added in the step before."""
    teacher, (x_T, cond) = tiny.teacher(CPU).at(1.0), tiny.evaluation_inputs(0)
    x_T, cond, network = x_T[:3], cond[:3], teacher.denoiser.network
    solver, t = (
        FeatureReuse(SOLVERS["ddim"](), 3, 1),
        torch.tensor([1.0, 0.6, 0.3, 0.0], dtype=torch.float64),
    )
    with torch.no_grad():
        state = solver.init(teacher, x_T, cond)
        x, _, state = solver.step(teacher, x_T, t[0], t[1], cond, state, None)
        outputs = list(network.features(x_T, torch.full((3,), 999.0), cond)[0])
        found = [solver.step(teacher, x, t[1], t[2], cond, state, None)[1] for _ in range(2)]
        (below,), c = network.features(x, torch.full((3,), 599.0), cond, 1)
        h = below + outputs[-1] - outputs[0]
        eps = network.image(network.final_layer(h, c))
    alpha, sigma = (float(value) for value in tiny.schedule.alpha_sigma(t[1]))
    torch.testing.assert_close(found[0], (x - sigma * eps) / alpha, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[0], found[1])  # the state is a value


def test_options_that_do_not_suit() -> None:
    with pytest.raises(
        UsageError, match="reuse_below is 12, but the teacher has 12 blocks: give at most 11"
    ):
        resolve(RunConfig(method="teacher", options={"reuse_every": 2, "reuse_below": 12}))
    with pytest.raises(UsageError, match="closed formula"):
        resolve(RunConfig(method="teacher", task="mixture", options={"reuse_every": 2}))
    ids = [
        resolve(RunConfig(method="teacher", options=options)).run_id
        for options in ({}, {"reuse_below": 2})
    ]
    assert ids[0] == ids[1]
