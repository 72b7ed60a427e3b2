"""The interface of a solver, and the only sampling loop: `sample` and `trace`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.registry import Registry, registry_of

Noise = Callable[[str], Tensor]
"""From a name ("step 3") to standard normal noise of the batch's shape."""


@dataclass(frozen=True)
class Trajectory:
    """The path of a batch from noise to data.

    Attributes:
        states: [B, K + 1, C, H, W], noise first.
        predictions: [B, K, C, H, W], the x_0 from each of the K evaluations.
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
        soon = torch.device(device).type == "cuda"  # the other way round a copy must be waited for
        states, predictions = (
            x.to(device, non_blocking=soon) for x in (self.states, self.predictions)
        )
        return Trajectory(states, predictions, self.levels, self.cond.to(device))


class Solver(ABC):
    """One step of a sampler.

    Its state between steps is an argument and a return value, never an attribute.
    """

    stochastic: ClassVar[bool] = False
    """Whether the solver draws noise and so follows no path of the ODE."""

    def init(self, model: Any, x_T: Tensor, cond: Condition) -> Any:
        """The state before the first step; None for a solver without memory."""
        return None

    @abstractmethod
    def step(self, model: Any, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition, state: Any,
             noise: Noise | None) -> tuple[Tensor, Tensor, Any]:  # fmt: skip
        """From x_t at timestep t to x_s at s < t.

        Returns:
            x_s [B, C, H, W]; the x_0 of the step's evaluation, same shape; the next state.
        """


SOLVERS: Registry[type[Solver]] = registry_of("solver")


def sample(
    solver: Solver,
    model: Any,
    x_T: Tensor,
    levels: Tensor,
    cond: Condition,
    noise: Noise | None = None,
) -> Tensor:
    """Samples of a model under a solver. The caller sets the gradient mode.

    Args:
        x_T: noise [B, C, H, W].
        levels: falling timesteps [K + 1], float64, from 1 (noise) to 0 (data).
        noise: the source of a stochastic solver's noise.

    Returns:
        x at the last level [B, C, H, W].
    """
    x = x_T
    for x, _ in _steps(solver, model, x_T, levels, cond, noise):  # noqa: B007
        pass
    return x


def trace(
    solver: Solver,
    model: Any,
    x_T: Tensor,
    levels: Tensor,
    cond: Condition,
    noise: Noise | None = None,
) -> Trajectory:
    """The whole path that `sample` takes, with the same arguments."""
    path = list(_steps(solver, model, x_T, levels, cond, noise))
    states, predictions = [x_T, *(x for x, _ in path)], [x_0 for _, x_0 in path]
    return Trajectory(torch.stack(states, 1), torch.stack(predictions, 1), levels, cond)


def _steps(
    solver: Solver, model: Any, x_T: Tensor, levels: Tensor, cond: Condition, noise: Noise | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The new x and the predicted x_0 after each step."""
    cond = cond.keeping()  # no weight changes before the last step
    x, state = x_T, solver.init(model, x_T, cond)
    for t, s in pairwise(levels):
        x, x_0, state = solver.step(model, x, t, s, cond, state, noise)
        yield x, x_0
