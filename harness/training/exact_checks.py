"""A check against an exact answer: a teacher whose data is one image for each class or prompt.

Its network gives that image as x_0, whatever x_t is, and so is exact at every level. Its ODE
leads along `alpha_t x_0 + sigma_t x_T`. So each point of a student's path is known.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from harness.data.images import ImageSet, Split
from harness.errors import UsageError
from harness.files import file_hash, write_tensors
from harness.methods.base import Method
from harness.networks.passes import count_passes
from harness.solvers import trace
from harness.tasks import Task
from harness.training.case import CPU, Case
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

SAMPLES = 40
"""Samples that are looked at, and samples in a training step."""
STAYS, LEARNS = 15, 150
"""Steps of training of a student that is exact before it, and of another one."""
NEAR, FALL, NOISE_OFF = 0.05, 0.9, 0.1
"""Distances: one that counts as none, as a share of pure noise's; what training may leave of a path
that is not exact; and that of a state's noise from its level's."""


def default_steps(case: Case) -> None:
    """At its default number of steps and an exact teacher, its path keeps to the exact points."""
    count = number_of_steps(case)
    exact = with_exact_teacher(case, count)
    try:
        case.cls.check(case.config, exact.task, count)
    except UsageError:
        return  # a method need not take a teacher that predicts x_0
    before = distances(exact, exact.build(total_steps=STAYS))
    steps = STAYS if all(off <= NEAR for _, off in before) else LEARNS
    method = exact.build(total_steps=steps)
    if method.players:
        settings = TrainSettings(steps, SAMPLES, 0, sample_group=case.config.sample_group)
        Trainer(method, exact.sources, settings, None, case.device).train()
    after = distances(exact, method)
    level, worst = max(after, key=lambda point: point[1])
    whole, left = (sum(off for _, off in path) for path in (before, after))
    where = f"at {count} steps, on an exact teacher, the state at t = {level:.2f}"
    assert worst <= NEAR or left <= FALL * whole, (
        f"{where} is {worst:.2f} of pure noise's distance from where it should be, after training "
        f"as before: the sampler or the loss does not do what {count} steps ask for"
    )
    assert after[-1][1] < 1, f"at {count} steps the samples are as far from the data as noise"


def number_of_steps(case: Case) -> int:
    """The method's default, or the case's if the case's options refuse it.

    Raises AssertionError if a method refuses its default under its own options.
    """
    count = case.cls.default_num_steps
    try:
        case.cls.check(case.config, case.task, count)
    except UsageError as error:
        if case.options:
            return case.num_steps
        if case.task.trajectory_steps % count == 0:
            raise AssertionError(f"it refuses its own default of {count} steps: {error}") from error
    return count


def with_exact_teacher(case: Case, count: int) -> Case:
    """The case at a number of steps, on one image for each condition and its exact teacher."""
    task, path = case.task, case.folder / "exact.safetensors"
    labels = torch.arange(task.conditions.count)
    state, images = exact_network(task, labels)
    case.folder.mkdir(parents=True, exist_ok=True)
    write_tensors(path, state)
    spec = task.spec
    weights = task.trained("teacher").model_copy(
        update={"file": str(path), "sha256": file_hash(path)}
    )
    update = {
        "name": "exact",
        "schedule": "vp",
        "prediction_type": "x_0",
        "guidance": spec.guidance.model_copy(update={"scale": 1.0}),
        "teacher": weights,
        "trajectories": spec.trajectories.model_copy(
            update={"steps": math.lcm(spec.trajectories.steps, count), "count": SAMPLES}
        ),
    }
    exact = Task(spec.model_copy(update=update), task.folder)
    real = ImageSet(images.repeat(SAMPLES, 1, 1, 1), labels.repeat(SAMPLES), task.conditions)
    exact.split = Split(real, real)
    return replace(case, task=exact, num_steps=count)


@torch.no_grad()
def exact_network(task: Task, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The task's network, changed to give an image of standard deviation 0.5 for each condition.

    Its final layer sees the label or the text's mean alone: there is no time in the conditioning
    vector, and adaLN's scale of -1 leaves its shift.

    Returns:
        Its weights, and the images [conditions, C, H, W].
    """
    network = task.teacher(CPU).denoiser.network
    state = network.state_dict()
    for name in ("t_embedder.mlp.2.weight", "t_embedder.mlp.2.bias"):
        state[name].zero_()
    shift_and_scale = "final_layer.adaLN_modulation.1"
    width = len(state[f"{shift_and_scale}.bias"]) // 2
    state[f"{shift_and_scale}.weight"][width:] = 0
    state[f"{shift_and_scale}.bias"][width:] = -1
    noise = torch.zeros(len(labels), *task.shape)
    size = network(noise, labels.float(), task.conditions.of(labels)).std()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name].mul_(0.5 / size)
    images = network(noise, labels.float(), task.conditions.of(labels))[:, : task.shape[0]]
    return state, images


@torch.no_grad()
def distances(case: Case, method: Method) -> list[tuple[float, float]]:
    """For each level after the first, the distance of the student's states from the exact ones.

    It is a share of the distance between pure noise and data. A sampler that draws noise has no
    exact state: there it counts how much noise the state has too much or too little.

    Raises AssertionError if a trained student's passes are not as many as its steps.
    """
    known = case.sources["trajectory"].batch(torch.arange(SAMPLES)).to(case.device)
    x_T, x_0 = known.states[:, 0], known.states[:, -1]
    noise = case.task.evaluation_noise(0, slice(0, SAMPLES))
    with count_passes(method.sampled_network) as passes:
        path = trace(method.solver, method.student, x_T, method.levels, known.cond, noise)
    made = passes.total / SAMPLES
    assert not method.players or made == case.num_steps, (
        f"num_steps is {case.num_steps}, but a sample takes {made:g} passes of the network"
    )
    own = type(method).teacher_points is not Method.teacher_points
    points = method.teacher_points(known) if own else None
    found, whole = [], float((x_T - x_0).square().mean().sqrt())
    for i, level in enumerate(method.levels.tolist()):
        alpha, sigma = (float(c) for c in case.task.schedule.alpha_sigma(method.levels[i]))
        x, clean = path.states[:, i], alpha * x_0
        if method.solver.stochastic and level:
            off = abs(float((x - clean).square().mean().sqrt()) - sigma) / whole
            found.append((level, 0.0 if off < NOISE_OFF else off))
        else:
            point = clean + sigma * x_T if points is None else points[:, i]
            found.append((level, float((x - point).square().mean().sqrt()) / whole))
    return found[1:]
