"""Levels for few steps, searched for on the teacher's own grid: a sampler without training that is worth more than equal spacing.

Coordinate descent: each inner level in turn goes to the place between its neighbours where samples end nearest to those of the full
grid from the same noise, until nothing moves. It looks at one number, the mean square between ends; the training-free opponents of a
distilled student in arXiv 2405.11326 (a grid chosen by dynamic programming) and 2405.15506 (by gradients) look at the same paths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.solvers.base import Solver, Trajectory, sample


@dataclass(frozen=True)
class LevelSearch:
    """What a search found.

    Attributes:
        levels: timesteps [S + 1], float64, from 1 to 0.
        mse, equal_mse: mean square between the ends of samples and of the full grid's, on these levels and on equally spaced ones.
        tried: how many sets of levels were sampled with.
    """

    levels: Tensor
    mse: float
    equal_mse: float
    tried: int


@torch.no_grad()
def search_levels(solver: Solver, model: Any, path: Trajectory, num_steps: int) -> LevelSearch:
    """The levels of `num_steps` steps out of those of a path.

    Args:
        path: trajectories of the model on a grid of K >= `num_steps` steps, the start and the aim of the search.

    Raises:
        ValueError: if the grid has fewer steps.
    """
    count = path.steps
    if num_steps > count:
        raise ValueError(f"num_steps is {num_steps}, but the grid has only {count} steps to choose from")
    known: dict[tuple[int, ...], float] = {}

    def mse(places: tuple[int, ...]) -> float:
        if places not in known:
            end = sample(solver, model, path.states[:, 0], path.levels[list(places)], path.cond)
            known[places] = float((end - path.states[:, -1]).double().square().mean())
        return known[places]

    start = best = tuple(count * i // num_steps for i in range(num_steps + 1))
    while True:
        before = best
        for i in range(1, num_steps):
            options = [(*best[:i], place, *best[i + 1 :]) for place in range(best[i - 1] + 1, best[i + 1])]
            best = min(options, key=mse)
        if best == before:
            return LevelSearch(path.levels[list(best)], mse(best), mse(start), len(known))
