"""The teacher itself under a solver with few steps: what a user has without distilling. Nothing is trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from harness.denoiser import Guided
from harness.methods.base import METHODS, Method, MethodConfig, Problem
from harness.schedules import few_step_levels
from harness.solvers import SOLVERS


@METHODS.register("teacher")
class Teacher(Method):
    """The guided teacher under a solver, on levels round(1000 k / S) - 1."""

    class Config(MethodConfig):
        solver: str = "ddim"
        """Name of the solver; `harness list solvers` lists them."""

    reference = "Song et al. 2021, arXiv 2010.02502 (DDIM)"

    def __init__(self, config: Any, teacher: Guided | None, task: Problem, num_steps: int, total_steps: int):
        assert teacher is not None
        self.players = {}
        self.student = teacher
        self.solver, self.levels = SOLVERS[config.solver](), few_step_levels(num_steps)

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        SOLVERS[config.solver]

    @property
    def passes_through(self) -> nn.Module:
        return self.student.denoiser.network  # type: ignore[union-attr, return-value]
