"""A search for the levels of a few-step sampler on the teacher's own grid, without training.

Coordinate descent on the mean square between the ends of samples and those of the full grid from
the same noise. Each inner level in turn moves to the best place between its neighbours, until
none moves. Related: arXiv 2405.11326 (dynamic programming) and 2405.15506 (gradients).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.solvers.base import Solver, Trajectory, sample


@dataclass(frozen=True)
class LevelSearch:
    """The result of a search.

    Attributes:
        levels: timesteps [S + 1], float64, from 1 to 0.
        mse: mean square between ends of samples on these levels and on the full grid.
        equal_mse: the same for equally spaced levels.
        tried: number of sets of levels that were evaluated.
    """

    levels: Tensor
    mse: float
    equal_mse: float
    tried: int


@torch.no_grad()
def search_levels(solver: Solver, model: Any, path: Trajectory, num_steps: int) -> LevelSearch:
    """The best levels for `num_steps` steps among those of a path.

    Args:
        path: trajectories of the model on a grid of K >= `num_steps` steps.

    Raises:
        ValueError: if the grid has fewer steps.
    """
    count = path.steps
    if num_steps > count:
        raise ValueError(
            f"num_steps is {num_steps}, but the grid has only {count} steps to choose from"
        )
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
            options = [
                (*best[:i], place, *best[i + 1 :]) for place in range(best[i - 1] + 1, best[i + 1])
            ]
            best = min(options, key=mse)
        if best == before:
            return LevelSearch(path.levels[list(best)], mse(best), mse(start), len(known))
