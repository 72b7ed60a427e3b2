"""FLOPs and seconds of a run before it starts, measured on steps with trajectories of noise."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from harness.data.recipe import Recipe
from harness.diffusion.conditions import Conditions
from harness.diffusion.counting import count_flops
from harness.diffusion.denoiser import Guided
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.methods import METHODS, Method, MethodConfig
from harness.networks.passes import count_passes
from harness.solvers import SOLVERS, Trajectory, sample
from harness.tasks import Task
from harness.training.batches import Source
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

NOMINAL_STEPS = 1000
"""Length of the run whose stages are measured when the real length is not known yet."""
PARTS = (0.0, 0.3, 0.6, 0.9)
"""Where in a run steps are timed, since stages of a method differ."""
Clock = Callable[[], float]
CLOCKS: tuple[Clock, Clock] = (time.perf_counter, time.process_time)
"""Seconds that pass, and seconds that the processors spend on all threads of this process."""


@dataclass(frozen=True)
class Blank:
    """Trajectories of noise in the shape of those of a recipe."""

    recipe: Recipe
    conditions: Conditions

    def __len__(self) -> int:
        return self.recipe.count

    def batch(self, items: Tensor) -> Trajectory:
        """states [B, K + 1, C, H, W], predictions [B, K, C, H, W]."""
        steps = self.recipe.steps
        states = Keyed("blank", 0).normal("states", items, (steps + 1, *self.recipe.shape))
        return Trajectory(
            states, states[:, 1:], self.recipe.levels, self.conditions.balanced(items)
        )


def rehearsal(
    name: str,
    config: MethodConfig,
    task: Task,
    num_steps: int,
    settings: TrainSettings,
    device: torch.device,
) -> Trainer:
    """A trainer of the method that reads trajectories of noise and writes nothing.

    It does not compile, which would take longer than the few steps that are measured.
    """
    teacher = task.teacher(device)
    with keyed_initialisation(settings.seed, name):
        method = METHODS[name](config, teacher, task, num_steps, settings.total_steps)
    method.to(device)
    sources: dict[str, Source] = {
        "data": task.split.train,
        "trajectory": Blank(
            task.recipe.of_run(settings.seed, METHODS[name].trajectory_grid(config)),
            task.conditions,
        ),
    }
    return Trainer(method, sources, replace(settings, compile=False), None, device)


BILLS: dict[Recipe, tuple[int, float]] = {}
"""What trajectories cost, by their recipe with seed 0: a sweep asks for the same often."""


def store_bill(teacher: Guided, recipe: Recipe, task: Task) -> tuple[int, float]:
    """Teacher passes and FLOPs of all trajectories of a recipe, counted on two made the same way.

    The numbers do not depend on values, so they are counted where the teacher is, once a process.
    """
    alike = replace(recipe, seed=0)
    if alike in BILLS:
        return BILLS[alike]
    device = next(iter(teacher.parameters()), torch.zeros(0)).device
    x_T = Keyed("blank", 0).normal("x_T", torch.arange(2), recipe.shape).to(device)
    cond = task.conditions.balanced(torch.arange(2)).to(device)
    with torch.no_grad(), count_passes(teacher.denoiser.network) as passes:
        solver = SOLVERS[recipe.solver]()
        flops = count_flops(lambda: sample(solver, teacher, x_T, recipe.levels, cond))
    BILLS[alike] = passes.total * recipe.count // 2, flops * recipe.count / 2
    return BILLS[alike]


def total_flops(trainer: Trainer) -> float:
    """Training FLOPs of the whole run."""
    method: Method = trainer.method
    return sum(
        trainer.flops_of(list(method.updates(step))) for step in range(trainer.settings.total_steps)
    )


def shortest(
    call: Callable[[], object], device: torch.device, times: int, clocks: Sequence[Clock] = CLOCKS
) -> float:
    """Seconds that a call takes on an otherwise idle machine: the shortest of several calls.

    Other programs only ever add to the time that passes, but hardly change the processor time. On
    an idle CPU some thread always runs, so that at most the processor time passes: the smaller of
    the two counts.
    """
    found = []
    for _ in range(times):
        before = [clock() for clock in clocks]
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent = [clock() - start for clock, start in zip(clocks, before, strict=True)]
        found.append(spent[0] if device.type == "cuda" else min(spent))
    return min(found)


def seconds_a_step(trainer: Trainer, clocks: Sequence[Clock] = CLOCKS) -> float:
    """Mean seconds of a training step over the parts of a run, each the shortest of three steps."""

    def step_at(step: int) -> None:
        trainer.step = step
        trainer.one_step()

    steps = [int(part * trainer.settings.total_steps) for part in PARTS]
    return sum(shortest(partial(step_at, step), trainer.device, 3, clocks) for step in steps) / len(
        PARTS
    )


def steps_within(flops: float, build: Callable[[int], Trainer]) -> int:
    """The largest number of steps whose training FLOPs stay within a budget; it may be 0.

    Args:
        build: makes the trainer of a run of so many steps. What a step costs may depend on its
            place in the run.
    """
    if flops <= 0:
        return 0
    first = build(NOMINAL_STEPS)
    steps = max(1, int(flops / (total_flops(first) / NOMINAL_STEPS)))  # mostly right, or nearly
    gap = 1
    low, high = 0, math.inf
    while high - low > 1:
        trainer = build(steps)
        trainer.known_flops = first.known_flops  # a loss costs the same anywhere in a run
        if total_flops(trainer) <= flops:
            low, steps = steps, steps + gap
        else:
            high, steps = steps, steps - gap
        gap *= 2
        if not low < steps < high:
            steps = int(low + high) // 2
    return low
