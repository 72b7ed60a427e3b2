"""The controls of step distillation and ARD.

They are masks, re-noised predictions, noise on the channels and a constant time.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from harness.diffusion.randomness import keyed_initialisation
from harness.diffusion.schedules import few_step_levels
from harness.methods import METHODS
from harness.methods.step_distillation import TrajectoryDistillation
from harness.solvers import DDIM, Trajectory, sample, trace
from harness.tasks import Task

CPU = torch.device("cpu")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("step-distillation", {}),
    ("ard", {"history_layers": 2}),
    ("ard", {"history_layers": 3, "history_depth": 1}),
    ("ard", {"history_layers": 1, "mask": "keep_first"}),
]


def trajectory(task: Task) -> Trajectory:
    x_T, cond = task.evaluation_inputs(0)
    with torch.no_grad():
        path = trace(DDIM(), task.teacher(CPU), x_T[:5], few_step_levels(4), cond[:5])
    return path


def build(
    task: Task, name: str, options: dict[str, Any], num_steps: int = 4
) -> TrajectoryDistillation:
    """A method with random changes of all the student's weights.

    No two heads and no two channels are then alike.
    """
    cls = METHODS[name]
    with keyed_initialisation(0, "controls"), torch.no_grad():
        method = cls(cls.Config(**options), task.teacher(CPU), task, num_steps, 10)
        for parameter in method.student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert isinstance(method, TrajectoryDistillation)
    return method


@pytest.mark.parametrize(("name", "history"), VARIANTS)
@pytest.mark.parametrize(
    ("kind", "heads", "time", "noise"),
    list(
        itertools.product(
            ("states", "predictions", "renoised"),
            ("shared", "per_step"),
            ("per_state", "constant"),
            (False, True),
        )
    ),
)
def test_cached_steps_on_the_teachers_points_give_the_masked_passs_answers(
    tiny: Task, name: str, history: dict[str, Any], kind: str, heads: str, time: str, noise: bool
) -> None:
    method = build(
        tiny,
        name,
        {
            "trajectory": kind,
            "heads": heads,
            "time_embedding": time,
            "noise_channels": noise,
            "parametrization": "direct",
            **history,
        },
    )
    method.student.double()
    path, points = trajectory(tiny), method.points
    x, _ = points.inputs_and_targets(
        replace(path, states=path.states.double(), predictions=path.predictions.double())
    )
    with torch.no_grad():
        output, _ = method.student(
            points.network_input(x, x[:, 0]), points.times.expand(5, 4), path.cond
        )
        state = method.solver.init(method.student, x[:, 0], path.cond)
        for i in range(4):
            t, s = method.levels[i], method.levels[i + 1]
            expected = points.next_input(points.answer(output[:, i], x[:, i], t, s), x[:, 0], s)
            found, _, state = method.solver.step(
                method.student, x[:, i], t, s, path.cond, state, None
            )
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_renoised_points_stand_at_their_levels(tiny: Task) -> None:
    options = {"trajectory": "renoised", "parametrization": "direct"}
    method = build(tiny, "step-distillation", options)
    path = trajectory(tiny)
    x, target = method.points.inputs_and_targets(path)
    alpha, sigma = (c.float() for c in tiny.schedule.alpha_sigma(method.levels[1]))
    torch.testing.assert_close(x[:, 1], alpha * path.predictions[:, 0] + sigma * path.states[:, 0])
    torch.testing.assert_close(target, path.predictions)
    assert method.points.times.tolist() == [999.0, 749.0, 499.0, 249.0]


def test_noise_on_the_channels_changes_nothing_at_the_start(tiny: Task) -> None:
    cls, path = METHODS["step-distillation"], trajectory(tiny)
    outputs = []
    for noise in (False, True):
        method = cls(cls.Config(noise_channels=noise), tiny.teacher(CPU), tiny, 4, 10)
        outputs.append(
            sample(
                method.solver,
                method.student.double(),
                path.states[:, 0].double(),
                method.levels,
                path.cond,
            )
        )
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)


def test_noise_on_the_channels_is_seen_by_every_step(tiny: Task) -> None:
    method, path = build(tiny, "step-distillation", {"noise_channels": True}), trajectory(tiny)
    x, _ = method.points.inputs_and_targets(path)
    times = method.points.times.expand(5, 4)
    seen = [
        method.student(method.points.network_input(x, noise), times, path.cond)[0]
        for noise in (x[:, 0], -x[:, 0])
    ]
    assert bool(((seen[0] - seen[1]).abs().amax((0, 2, 3, 4)) > 1e-4).all())


def test_under_a_constant_time_the_untrained_student_is_nothing_simple(tiny: Task) -> None:
    assert build(tiny, "step-distillation", {}).untrained_sampler() is not None
    constant = build(tiny, "step-distillation", {"time_embedding": "constant"})
    assert constant.untrained_sampler() is None


def test_a_constant_time_is_the_noises(tiny: Task) -> None:
    for protocol in ("states", "released"):
        options = {"history_layers": 1, "protocol": protocol, "time_embedding": "constant"}
        assert build(tiny, "ard", options).points.times.tolist() == [999.0] * 4


def test_a_mask_decides_which_states_are_seen(tiny: Task) -> None:
    """The last answer's gradient with respect to a state is zero exactly where it is masked."""
    seen = {}
    for name, history in VARIANTS:
        method, path = build(tiny, name, history), trajectory(tiny)
        x, _ = method.points.inputs_and_targets(path)
        x = x.clone().requires_grad_()
        output, _ = method.student(x, method.points.times.expand(5, 4), path.cond)
        output[:, 3].square().sum().backward()
        assert x.grad is not None
        seen[str(history)] = (x.grad.abs().amax((0, 2, 3, 4)) > 0).tolist()
    assert seen[str({})] == [False, False, False, True]
    assert seen[str({"history_layers": 2})] == [True] * 4
    assert seen[str({"history_layers": 1, "mask": "keep_first"})] == [True, False, False, True]


def test_a_window_of_one_layer_reaches_one_state_back(tiny: Task) -> None:
    method, path = build(tiny, "ard", {"history_layers": 1, "history_depth": 1}), trajectory(tiny)
    x, _ = method.points.inputs_and_targets(path)
    x = x.clone().requires_grad_()
    method.student(x, method.points.times.expand(5, 4), path.cond)[0][
        :, 3
    ].square().sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().amax((0, 2, 3, 4)) > 0).tolist() == [False, False, True, True]
