"""A Gaussian with a closed-form denoiser, ODE and jumps, and a task of it, for exact tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harness.diffusion.conditions import Condition, Conditions
from harness.diffusion.denoiser import Prediction
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.diffusion.schedules import Schedule, few_step_levels, schedule_of
from harness.methods import METHODS, Batch
from harness.methods.parts.student import flow_time, time_of_flow
from harness.solvers import Trajectory

MEAN, STD, SHAPE, COUNT = 0.3, 0.5, (1, 2, 2), 512
BATCHES = 48
Exact = Callable[[Tensor, Tensor, Condition, Schedule], Prediction]


def wide(coefficient: Tensor) -> Tensor:
    return coefficient.double().reshape(-1, 1, 1, 1)


def posterior(x: Tensor, t: Tensor, cond: Condition, schedule: Schedule) -> Prediction:
    """E[x_0 | x_t] and E[eps | x_t]: the teacher."""
    alpha, sigma = (wide(c) for c in schedule.alpha_sigma(t))
    score = (x.double() - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    return with_v(MEAN + alpha * STD**2 * score, sigma * score, t, schedule)


def with_v(x_0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Prediction:
    a, b = (wide(c) for c in schedule.v_weights(t))
    return Prediction(x_0, eps, a * x_0 + b * eps)


def carried(x: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """Where the ODE leads from x at t to s: the standardised x does not change."""
    (a, sigma), (b, sigma_s) = ([wide(c) for c in schedule.alpha_sigma(level)] for level in (t, s))
    z = (x.double() - a * MEAN) / (a**2 * STD**2 + sigma**2).sqrt()
    return b * MEAN + (b**2 * STD**2 + sigma_s**2).sqrt() * z


def towards(x: Tensor, t: Tensor, there: Tensor, s: Tensor, schedule: Schedule) -> Prediction:
    """The prediction whose DDIM step leads from x at t to `there` at s."""
    (a, sigma), (b, sigma_s) = ([wide(c) for c in schedule.alpha_sigma(level)] for level in (t, s))
    x_0 = (sigma_s * x.double() - sigma * there) / (sigma_s * a - sigma * b)
    eps = (a * there - b * x.double()) / (a * sigma_s - b * sigma)
    return with_v(x_0, eps, t, schedule)


def end(x: Tensor, t: Tensor, cond: Condition, schedule: Schedule) -> Prediction:
    """A consistency function: x_0 is the end of the ODE."""
    zero = torch.zeros_like(t)
    return towards(x, t, carried(x, t, zero, schedule), zero, schedule)


def fading(x: Tensor, t: Tensor, cond: Condition, schedule: Schedule) -> Prediction:
    """A consistency function that forgets with time."""
    zero = torch.zeros_like(t)
    return towards(
        x,
        t,
        MEAN + (1 - 0.5 * wide(t)) * (carried(x, t, zero, schedule) - MEAN) + 0.2 * wide(t),
        zero,
        schedule,
    )


def jump(x: Tensor, t: Tensor, cond: Condition, schedule: Schedule) -> Prediction:
    """Jumps along the ODE to the condition's target time; at s = t, the teacher's prediction."""
    s = schedule.time_from_network(cond.scalars["target"]).clamp(min=0)
    s = torch.minimum(s, t - 1e-5).clamp(min=0)
    return towards(x, t, carried(x, t, s, schedule), s, schedule)


def step(x: Tensor, t: Tensor, cond: Condition, schedule: Schedule) -> Prediction:
    """Jumps by the condition's step size in flow time."""
    s = time_of_flow(
        schedule, (flow_time(schedule, t) - cond.scalars["step_size"].double() / 1000).clamp(min=0)
    )
    s = torch.minimum(s, t - 1e-5).clamp(min=0)
    return towards(x, t, carried(x, t, s, schedule), s, schedule)


class Model(nn.Module):
    """A denoiser with a closed formula, distorted by parameters that are 0."""

    prediction_type = "v"

    def __init__(self, formula: Exact, schedule: Schedule):
        super().__init__()
        self.formula, self.schedule = formula, schedule
        self.distortion = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        t = t.double().expand(len(x_t)).clamp(min=1e-4)
        exact = self.formula(x_t, t, cond, self.schedule)
        u, tau = exact.eps - exact.x_0, wide(flow_time(self.schedule, t))
        # Distorts the velocity: bounded in x_0 and eps, with x_t unchanged.
        off = self.distortion[0] * torch.tanh(u) + self.distortion[1]
        return with_v(exact.x_0 - tau * off, exact.eps + (1 - tau) * off, t, self.schedule)

    @property
    def denoiser(self) -> Model:
        return self

    def at(self, scale: Any) -> Model:
        return self

    @property
    def network(self) -> nn.Module:
        return nn.Identity()


class GaussianTask:
    """The part of a task that methods use."""

    shape, num_classes, trajectory_steps = SHAPE, 1, 8
    network_options: ClassVar[dict[str, int]] = {
        "image_size": 2,
        "patch_size": 1,
        "in_channels": 1,
        "hidden_size": 8,
        "depth": 1,
        "num_heads": 1,
        "num_classes": 1,
    }
    prediction_type, network_teacher, data_std, guidance_scale = "eps", False, STD, 1.0
    null = Conditions(1).null

    def __init__(self, schedule: str):
        self.schedule = schedule_of(schedule)


def built(
    name: str,
    formula: Exact | None = None,
    schedule: str = "vp",
    num_steps: int = 4,
    **options: Any,
) -> Any:
    """A method whose student, slow copy and average are the formula."""
    task = GaussianTask(schedule)
    cls = METHODS[name]
    with keyed_initialisation(0, name):
        method: Any = cls(
            cls.Config(**options), Model(posterior, task.schedule), task, num_steps, 100
        )  # type: ignore[arg-type]
    if formula is not None:
        method.model = method.target_model = Model(formula, task.schedule)
    return method


def batches(
    count: int = BATCHES, size: int = COUNT, paths: bool = False, schedule: str = "vp"
) -> Iterator[Batch]:
    """Batches of exact samples, or of exact pairs of noise and sample."""
    for number in range(count):
        index, keys = (
            torch.arange(number * size, (number + 1) * size),
            Keyed("fixed point", 0, number),
        )
        cond = Condition(torch.zeros(size, dtype=torch.long))
        x_0 = (MEAN + STD * keys.normal("x_0", index, SHAPE)).double()
        if not paths:
            yield Batch(index, (x_0, cond), None, keys)
            continue
        x_T = keys.normal("x_T", index, SHAPE).double()
        one = torch.ones(size, dtype=torch.float64)
        x_0 = carried(x_T, one, 0 * one, schedule_of(schedule))
        yield Batch(
            index,
            None,
            Trajectory(torch.stack([x_T, x_0], 1), x_0.unsqueeze(1), few_step_levels(1), cond),
            keys,
        )


def largest_z(
    method: Any, loss: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]], **more: Any
) -> float:
    """How many standard errors the mean gradient of the distortion is from 0, at most."""
    found = []
    for batch in batches(**more):
        method.model.distortion.grad = None
        loss(batch)[0].backward()
        found.append(method.model.distortion.grad.clone())
    gradients = torch.stack(found)
    return float((gradients.mean(0).abs() / (gradients.std(0) / len(gradients) ** 0.5)).max())
