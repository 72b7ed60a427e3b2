"""What a run will cost, before it starts: FLOPs and seconds of its steps, on samples that hold nothing. Floor 6."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.data.trajectories import Recipe
from harness.diffusion.conditions import Conditions
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.diffusion.schedules import few_step_levels
from harness.methods import METHODS, Method, MethodConfig
from harness.solvers import Trajectory
from harness.tasks import Task
from harness.training.batches import Source
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

NOMINAL_STEPS = 1000
"""Length of the run on which phases are looked for."""
PARTS = (0.0, 0.3, 0.6, 0.9)
"""Where in a run steps are timed: stages of a method differ."""


@dataclass(frozen=True)
class Blank:
    """Trajectories of noise, in the shape of a recipe's."""

    recipe: Recipe
    conditions: Conditions

    def __len__(self) -> int:
        return self.recipe.count

    def batch(self, items: Tensor) -> Trajectory:
        """states [B, K + 1, C, H, W], predictions [B, K, C, H, W]."""
        steps = self.recipe.steps
        states = Keyed("blank", 0).normal("states", items, (steps + 1, *self.recipe.shape))
        return Trajectory(states, states[:, 1:], few_step_levels(steps), self.conditions.balanced(items))


def rehearsal(name: str, config: MethodConfig, task: Task, num_steps: int, settings: TrainSettings, device: torch.device) -> Trainer:
    """A trainer of the method that reads blank trajectories and keeps nothing. It never compiles, which takes longer than a few steps."""
    teacher = task.teacher(device)
    with keyed_initialisation(settings.seed, name):
        method = METHODS[name](config, teacher, task, num_steps, settings.total_steps)
    method.to(device)
    sources: dict[str, Source] = {"data": task.split.train, "trajectory": Blank(task.recipe, task.conditions)}
    return Trainer(method, sources, replace(settings, compile=False), None, device)


def total_flops(trainer: Trainer) -> float:
    """Training FLOPs of the whole run."""
    method: Method = trainer.method
    return sum(trainer.flops_of(list(method.updates(step))) for step in range(trainer.settings.total_steps))


def seconds_a_step(trainer: Trainer) -> float:
    """Mean seconds of a training step, timed once in each of its parts after one untimed step."""
    spent = 0.0
    for part in PARTS:
        for _ in range(2):  # the second one counts
            trainer.step = int(part * trainer.settings.total_steps)
            start = time.perf_counter()
            trainer.one_step()
            if trainer.device.type == "cuda":
                torch.cuda.synchronize(trainer.device)
            last = time.perf_counter() - start
        spent += last
    return spent / len(PARTS)


def steps_within(flops: float, build: Callable[[int], Trainer]) -> int:
    """The largest number of steps whose training FLOPs do not exceed a budget, 0 if a single one does.

    Args:
        build: from a number of steps to a trainer; what a step costs may depend on where in the run it is.
    """
    first = build(NOMINAL_STEPS)
    steps, gap = max(1, int(flops / (total_flops(first) / NOMINAL_STEPS))), 1  # most often right, so that its neighbours come next
    low, high = 0, math.inf
    while high - low > 1:
        trainer = build(steps)
        trainer.known_flops = first.known_flops  # of a loss, wherever in a run it stands
        if total_flops(trainer) <= flops:
            low, steps = steps, steps + gap
        else:
            high, steps = steps, steps - gap
        gap *= 2
        if not low < steps < high:
            steps = int(low + high) // 2
    return low
