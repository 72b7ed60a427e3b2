"""What a solver is, and the only sampling loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.registry import Registry, registry_of

Noise = Callable[[str], Tensor]
"""From a name ("step 3") to standard normal noise shaped like the batch."""


@dataclass(frozen=True)
class Trajectory:
    """The path of a batch from noise to data.

    Attributes:
        states: [B, K + 1, C, H, W], noise first.
        predictions: [B, K, C, H, W], the x_0 that each of the K evaluations returned.
        levels: timesteps of the states, [K + 1], float64.
        cond: the condition of each sample.
    """

    states: Tensor
    predictions: Tensor
    levels: Tensor
    cond: Condition

    @property
    def steps(self) -> int:
        """K, the number of evaluations."""
        return self.predictions.shape[1]

    def to(self, device: torch.device | str) -> Trajectory:
        return Trajectory(self.states.to(device), self.predictions.to(device), self.levels, self.cond.to(device))


class Solver(ABC):
    """One step of a sampler. What it carries between steps is a value: passed in, returned, never kept on the object."""

    stochastic: ClassVar[bool] = False
    """Whether it draws noise, so that it follows no path of the ODE."""

    def init(self, model: Any, x_T: Tensor, cond: Condition) -> Any:
        """The state before the first step; None for a one-step solver."""
        return None

    @abstractmethod
    def step(self, model: Any, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition, state: Any,
             noise: Noise | None) -> tuple[Tensor, Tensor, Any]:  # fmt: skip
        """From x_t at timestep t to x_s at s < t.

        Returns:
            x_s [B, C, H, W]; the x_0 that the step's evaluation predicted [B, C, H, W]; the next state.
        """


SOLVERS: Registry[Solver] = registry_of("solver")


def integrate(solver: Solver, model: Any, x_T: Tensor, levels: Tensor, cond: Condition, noise: Noise | None = None, *,
              save: bool = False) -> Tensor | Trajectory:  # fmt: skip
    """Samples from noise to data. It never sets the gradient mode.

    Args:
        x_T: noise [B, C, H, W].
        levels: falling timesteps [K + 1], float64, from 1 (noise) to 0 (data).
        noise: where a stochastic solver draws from.
        save: whether to return the whole trajectory.

    Returns:
        x at the last level [B, C, H, W], or under `save` the `Trajectory`.
    """
    x, state = x_T, solver.init(model, x_T, cond)
    states, predictions = [x], []
    for t, s in pairwise(levels):
        x, x_0, state = solver.step(model, x, t, s, cond, state, noise)
        if save:
            states.append(x)
            predictions.append(x_0)
    if not save:
        return x
    return Trajectory(torch.stack(states, 1), torch.stack(predictions, 1), levels, cond)
