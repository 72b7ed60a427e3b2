"""The teacher itself under a solver with few steps: what a user has without distilling. Nothing is trained.

Its levels are equally spaced or given; `harness teacher levels` searches for good ones (`solvers/search.py`). With `reuse_every` n,
all but every n-th step run the lowest blocks alone and reuse what the others added (feature caching, `solvers/feature_reuse.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import nn

from harness.diffusion.denoiser import Guided
from harness.diffusion.schedules import few_step_levels
from harness.errors import UsageError
from harness.methods.base import METHODS, Method, Problem
from harness.methods.parts.options import MethodConfig, Numbers
from harness.solvers import SOLVERS, FeatureReuse


class TeacherConfig(MethodConfig):
    solver: str = "ddim"
    """Name of the solver; `harness list solvers` lists them."""
    levels: Numbers = ()
    """Timesteps in thousandths, as in 167,417,833, at which it is asked beside pure noise; none means equally spaced."""
    reuse_every: int = Field(1, ge=1, le=1000)
    """One full pass in so many steps, the others reuse its upper blocks; 1 is never."""
    reuse_below: int = Field(4, ge=1, le=1000)
    """How many of the lowest blocks run in the steps that reuse."""


@METHODS.register("teacher")
class Teacher(Method):
    """No distillation: the guided teacher sampled by an ODE solver in few steps."""

    Config = TeacherConfig
    reference = "Song et al. 2021, arXiv 2010.02502 (DDIM); feature caching: Chen et al. 2024, arXiv 2406.01125"

    def __init__(self, config: Any, teacher: Guided | None, task: Problem, num_steps: int, total_steps: int):
        assert teacher is not None
        self.players = {}
        self.student = teacher
        self.solver, self.levels = SOLVERS[config.solver](), few_step_levels(num_steps)
        if config.levels:
            self.levels = torch.tensor([1000, *reversed(config.levels), 0], dtype=torch.float64, device="cpu") / 1000
        if config.reuse_every > 1:
            self.solver = FeatureReuse(self.solver, config.reuse_every, config.reuse_below)

    @classmethod
    def canonical(cls, config: Any, num_steps: int) -> tuple[str, Any]:
        equal = [round(1000 * float(level)) for level in few_step_levels(num_steps)[1:-1]]
        if list(config.levels) == sorted(equal):
            config = config.model_copy(update={"levels": ()})
        if config.reuse_every == 1 or num_steps == 1:
            idle = {"reuse_every": 1, "reuse_below": cls.Config.model_fields["reuse_below"].default}
            config = config.model_copy(update=idle)
        return METHODS.name_of(cls), config

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        SOLVERS[config.solver]
        if config.levels and len(config.levels) != num_steps - 1:
            raise UsageError(f"{num_steps} steps have {num_steps - 1} levels between noise and data, but {len(config.levels)} are given")
        if config.levels and config.levels[-1] >= 1000:
            raise UsageError(f"levels hold {config.levels[-1]}, but must lie between 0 and 1000, which are data and noise")
        if config.reuse_every == 1:
            return
        if not task.network_teacher:
            raise UsageError("reuse_every needs a teacher with blocks, but this task's is a closed formula: leave it out")
        if config.reuse_below >= (depth := task.network_options["depth"]):
            raise UsageError(f"reuse_below is {config.reuse_below}, but of {depth} blocks at most {depth - 1} leave something to reuse")

    @property
    def sampled_network(self) -> nn.Module:
        return self.student.denoiser.network  # type: ignore[union-attr, return-value]
