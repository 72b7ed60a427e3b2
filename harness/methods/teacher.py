"""The teacher itself under a solver with few steps: what a user has without distilling. Nothing is trained.

With `reuse_every` n, all but every n-th step run the lowest blocks alone and reuse what the others added (feature caching,
`solvers/feature_reuse.py`).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import nn

from harness.denoiser import Guided
from harness.errors import UsageError
from harness.methods.base import METHODS, Method, MethodConfig, Problem
from harness.schedules import few_step_levels
from harness.solvers import SOLVERS, FeatureReuse


class TeacherConfig(MethodConfig):
    solver: str = "ddim"
    """Name of the solver; `harness list solvers` lists them."""
    reuse_every: int = Field(1, ge=1, le=1000)
    """One full pass in so many steps, the others reuse its upper blocks; 1 is never."""
    reuse_below: int = Field(4, ge=1, le=1000)
    """How many of the lowest blocks run in the steps that reuse."""


@METHODS.register("teacher")
class Teacher(Method):
    """The guided teacher under a solver, on levels round(1000 k / S) - 1."""

    Config = TeacherConfig
    reference = "Song et al. 2021, arXiv 2010.02502 (DDIM); feature caching: Chen et al. 2024, arXiv 2406.01125"

    def __init__(self, config: Any, teacher: Guided | None, task: Problem, num_steps: int, total_steps: int):
        assert teacher is not None
        self.players = {}
        self.student = teacher
        self.solver, self.levels = SOLVERS[config.solver](), few_step_levels(num_steps)
        if config.reuse_every > 1:
            self.solver = FeatureReuse(self.solver, config.reuse_every, config.reuse_below)

    @classmethod
    def canonical(cls, config: Any, num_steps: int) -> tuple[str, Any]:
        plain = config.model_copy(update={"reuse_every": 1, "reuse_below": cls.Config.model_fields["reuse_below"].default})
        return METHODS.name_of(cls), config if config.reuse_every > 1 and num_steps > 1 else plain

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        SOLVERS[config.solver]
        if config.reuse_every == 1:
            return
        if not task.network_teacher:
            raise UsageError("reuse_every needs a teacher with blocks, but this task's is a closed formula: leave it out")
        if config.reuse_below >= (depth := task.network_options["depth"]):
            raise UsageError(f"reuse_below is {config.reuse_below}, but of {depth} blocks at most {depth - 1} leave something to reuse")

    @property
    def passes_through(self) -> nn.Module:
        return self.student.denoiser.network  # type: ignore[union-attr, return-value]
