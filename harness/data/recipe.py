"""What trajectories are, and how they are computed.

The digest of a store covers this file, what it imports, the solver and the teacher's networks, so
nothing else belongs here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from harness.diffusion.conditions import Conditions
from harness.diffusion.denoiser import Model
from harness.diffusion.randomness import Keyed
from harness.diffusion.schedules import GRIDS
from harness.solvers.base import SOLVERS, trace


@dataclass(frozen=True)
class Recipe:
    """The trajectories of a run.

    Attributes:
        teacher: SHA-256 of the teacher's weights, or of weights and network (`teacher_identity`).
        schedule, prediction_type: the schedule's name and the teacher's prediction type.
        guidance_scale, guidance_channels, guidance_norm_patch: the teacher's guidance.
        solver, steps: the solver's name and its number of steps K.
        count, seed: number of trajectories and the seed of their noise.
        shape: [C, H, W] of a state.
        num_classes: number of conditions; sample i has condition i mod `num_classes`.
        conditions: SHA-256 of the prompts, if the conditions are prompts.
        grid: the name of the grid of levels; see `GRIDS`.
        dtype: how numbers are stored.
        precision: the type that the teacher's layers compute in; "bf16" runs it under autocast.
        compile: whether the teacher goes through torch.compile.
    """

    teacher: str
    schedule: str
    prediction_type: str
    guidance_scale: float
    guidance_channels: int | None
    solver: str
    steps: int
    count: int
    seed: int
    shape: tuple[int, int, int]
    num_classes: int
    conditions: str = ""
    grid: str = "few-step"
    dtype: Literal["float32", "float16"] = "float32"
    guidance_norm_patch: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False

    @property
    def levels(self) -> Tensor:
        """Timesteps of the states, [K + 1], float64."""
        return GRIDS[self.grid](self.steps)

    @property
    def size(self) -> int:
        """Bytes of a stored trajectory: K + 1 states and K predictions."""
        return (2 * self.steps + 1) * math.prod(self.shape) * (4 if self.dtype == "float32" else 2)

    def of_run(self, seed: int, grid: tuple[str, int] | None = None) -> Recipe:
        """The recipe of a run with this seed: seeds have noise of their own.

        Args:
            grid: the name and K of the grid that the run's method asks for, if any.
        """
        name, steps = grid or (self.grid, self.steps)
        return replace(self, seed=self.seed + seed, grid=name, steps=steps)


@torch.no_grad()
def compute(
    recipe: Recipe, conditions: Conditions, teacher: Model, items: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """States [B, K + 1, C, H, W] and predictions [B, K, C, H, W] of items [B], float32."""
    x_T = Keyed("trajectory", recipe.seed).normal("x_T", items, recipe.shape).to(device)
    cond = conditions.balanced(items).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        path = trace(SOLVERS[recipe.solver](), teacher, x_T, recipe.levels, cond)
    return {"states": path.states, "predictions": path.predictions}
