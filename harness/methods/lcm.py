"""Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378, alg. 1): guidance is a condition of the student.

Between levels t > s of a coarse grid the teacher, guided at a scale w drawn for each sample, takes one DDIM step, and

    L = d(f(x_t, w, c, t), sg f^-(x_s, w, c, s)).

f is the x_0-prediction, as in `consistency.py`; f^- follows slowly. The student is sampled at the task's guidance scale. Ours: the
interval of w, and a pseudo-Huber distance of the whole vector where the released code's is of each number.

Untrained, the student's first step is the unguided teacher's x_0-prediction, whatever w. Exact: at the map that takes the guided
teacher's remaining steps on the grid the loss is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from harness.conditions import Condition
from harness.denoiser import Guided
from harness.errors import UsageError
from harness.methods.base import METHODS, Batch, Problem
from harness.methods.student import ConsistencySteps, DenoisingStudent, HuberConfig, consistency_untrained
from harness.schedules import few_step_levels
from harness.solvers.ddim import ddim_step


class LCMConfig(HuberConfig):
    huber_c: float = Field(0.001, gt=0, le=1e3)
    """c of pseudo-Huber, for one dimension."""
    guidance_from: float = Field(1.0, ge=0, le=100)
    """Smallest guidance scale that is drawn."""
    guidance_to: float = Field(2.0, ge=0, le=100)
    """Largest guidance scale that is drawn."""
    grid_levels: int = Field(48, ge=2, le=1000)
    """Levels of the grid between which the teacher steps (the paper's 50, made divisible)."""
    target_half_life: float = Field(0.0135, gt=0, le=1)
    """Half-life of the moving target, as a fraction of the run (the paper's decay of 0.95 in a run of 1,000 steps)."""


@METHODS.register("lcm")
class LCM(DenoisingStudent):
    """Consistency distillation of a teacher whose guidance scale is told."""

    Config = LCMConfig
    any_step = True
    scalars = ("guidance",)
    reference: ClassVar = "Luo et al. 2023, arXiv 2310.04378, alg. 1 and eq. 13 to 17"

    def __init__(self, config: LCMConfig, teacher: Guided | None, task: Problem, num_steps: int, total_steps: int):
        super().__init__(config, teacher, task, num_steps, total_steps, config.target_half_life)
        self.grid = few_step_levels(config.grid_levels)
        self.solver = ConsistencySteps(guidance=1000 * task.guidance_scale)  # embedded as the released code does it

    def untrained(self) -> Callable[[Tensor, Condition], Tensor] | None:
        return consistency_untrained(self)

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        if config.grid_levels % num_steps:
            raise UsageError(f"num_steps is {num_steps}, but must divide grid_levels, which is {config.grid_levels}")
        scale = task.guidance_scale
        if not config.guidance_from <= scale <= config.guidance_to:
            raise UsageError(
                f"guidance_from and guidance_to are {config.guidance_from:g} and {config.guidance_to:g}, but the task's scale is "
                f"{scale:g}: give an interval that holds it"
            )

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.data is not None
        x_0, cond = batch.data
        scale = self.config.guidance_from + batch.uniform("guidance") * (self.config.guidance_to - self.config.guidance_from)
        place = (batch.uniform("level") * (len(self.grid) - 1)).long()
        t, s = (self.grid.to(x_0.device)[i] for i in (place, place + 1))
        x_t, told = self.noised(x_0, batch.normal("eps", x_0.shape[1:]), t), cond.told(guidance=1000 * scale)
        with torch.no_grad():
            x_s = ddim_step(self.teacher.at(scale)(x_t, t, cond), s, self.schedule)
            clean = (s == 0).reshape(-1, 1, 1, 1)
            target = torch.where(clean, x_s, self.target_model(x_s, s, told).x_0)
        off = self.model(x_t, t, told).x_0 - target
        return self.config.distance(off).mean(), {"mse": off.detach().square().mean()}
