"""Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378, alg. 1).

The guidance scale w is an input of the student and random for each sample. Between levels t > s of
a coarse grid the teacher takes one DDIM step, guided at w:

    L = d(f(x_t, w, c, t), sg f^-(x_s, w, c, s))

f is the x_0-prediction, as in `consistency.py`, and f^- the target average. Sampling uses the
task's guidance scale. Without guidance, at scale 1, the interval is that one number and the
teacher's unconditional pass is left out. Ours: the interval of w, and a pseudo-Huber distance of
the whole vector, where the released code has one for each component.

Untrained: the first step is the unguided teacher's x_0-prediction for every w. Exact: the loss is 0
at the map that takes the guided teacher's remaining steps on the grid.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Guided
from harness.diffusion.schedules import few_step_levels
from harness.errors import UsageError
from harness.methods.base import METHODS, Batch, Problem
from harness.methods.consistency import GridDistillation
from harness.methods.parts.options import Span
from harness.methods.parts.samplers import ConsistencySteps
from harness.methods.parts.student import HuberConfig
from harness.solvers import DDIM


class LCMConfig(HuberConfig):
    huber_c: float = Field(0.001, gt=0, le=1e3)
    """c of pseudo-Huber for one dimension."""
    guidance_from: float = Field(1.0, ge=0, le=100)
    """Smallest guidance scale in training."""
    guidance_to: float | None = Field(None, ge=0, le=100)
    """Largest guidance scale in training; none is twice the task's scale less 1."""
    grid_levels: int = Field(48, ge=2, le=1000)
    """Number of levels of the teacher's grid (paper: 50; 48 has more divisors)."""
    target_half_life: float = Field(13.5, gt=0, le=1e6)
    """Half-life of the target average in steps (paper: decay 0.95, which is 13.5)."""


@METHODS.register("lcm")
class LCM(GridDistillation):
    """Latent consistency models: consistency distillation conditioned on the guidance scale."""

    Config = LCMConfig
    tunes: ClassVar = {
        "lr": Span(1e-4, 1e-2, log=True),
        "loss": ("huber", "l2"),
        "target_half_life": Span(3.0, 100.0, log=True),
    }
    scalars = ("guidance",)
    reference: ClassVar = "Luo et al. 2023, arXiv 2310.04378, alg. 1 and eq. 13 to 17"

    def __init__(
        self,
        config: LCMConfig,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        super().__init__(config, teacher, task, num_steps, total_steps, config.target_half_life)
        self.teacher_solver, self.grid = DDIM(), few_step_levels(config.grid_levels)
        self.scales = self.interval(config, task)
        # The released code embeds 1000 times the scale.
        self.solver = ConsistencySteps(guidance=1000 * task.guidance_scale)

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        if config.grid_levels % num_steps:
            raise UsageError(
                f"num_steps is {num_steps}, but must divide grid_levels, "
                f"which is {config.grid_levels}"
            )
        (low, high), scale = cls.interval(config, task), task.guidance_scale
        if not low <= scale <= high:
            raise UsageError(
                f"guidance_from and guidance_to are {low:g} and {high:g}, "
                f"but the task's scale is {scale:g}: give an interval that contains it"
            )

    @staticmethod
    def interval(config: Any, task: Problem) -> tuple[float, float]:
        """The smallest and largest guidance scale in training."""
        low, high = config.guidance_from, config.guidance_to
        return low, 2 * task.guidance_scale - 1 if high is None else high

    def teacher_and_condition(self, batch: Batch, cond: Condition) -> tuple[Guided, Condition]:
        low, high = self.scales
        scale = low + batch.uniform("guidance") * (high - low)
        teacher = self.teacher.at(scale if high > low else low)
        return teacher, cond.with_scalars(guidance=1000 * scale)
