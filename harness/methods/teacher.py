"""The teacher under a few-step solver, the baseline without distillation. Nothing is trained.

Levels are equally spaced or given; `harness teacher levels` searches for good ones
(`solvers/search.py`). Under `reuse_every` n, all but every n-th step run the lowest blocks and
reuse the contribution of the upper blocks (feature caching, `solvers/feature_reuse.py`).
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
from harness.networks.backbones import depth_of
from harness.solvers import SOLVERS, FeatureReuse


class TeacherConfig(MethodConfig):
    solver: str = "ddim"
    """Name of the solver; `harness list solvers` lists them."""
    levels: Numbers = ()
    """Timesteps below 1 in thousandths, as in 167,417,833; none means equally spaced."""
    reuse_every: int = Field(1, ge=1, le=1000)
    """Every n-th step is a full pass, the others reuse its upper blocks; 1 turns reuse off."""
    reuse_below: int = Field(4, ge=1, le=1000)
    """Number of lowest blocks that run in the other steps."""


@METHODS.register("teacher")
class Teacher(Method):
    """No distillation: the guided teacher sampled by an ODE solver in few steps."""

    Config = TeacherConfig
    reference = (
        "Song et al. 2021, arXiv 2010.02502 (DDIM); "
        "feature caching: Chen et al. 2024, arXiv 2406.01125"
    )

    def __init__(
        self, config: Any, teacher: Guided | None, task: Problem, num_steps: int, total_steps: int
    ):
        assert teacher is not None
        self.players = {}
        self.student = teacher
        self.solver, self.levels = SOLVERS[config.solver](), few_step_levels(num_steps)
        if config.levels:
            self.levels = (
                torch.tensor([1000, *reversed(config.levels), 0], dtype=torch.float64, device="cpu")
                / 1000
            )
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
            raise UsageError(
                f"{num_steps} steps have {num_steps - 1} levels between noise and data, "
                f"but {len(config.levels)} are given"
            )
        if config.levels and config.levels[-1] >= 1000:
            raise UsageError(
                f"levels hold {config.levels[-1]}, but must lie between 0 and 1000, data and noise"
            )
        if config.reuse_every == 1:
            return
        if not task.network_teacher:
            raise UsageError(
                "reuse_every needs a teacher that is a network, "
                "but this task's is a closed formula: leave it out"
            )
        if config.reuse_below >= (depth := depth_of(task.network_options)):
            raise UsageError(
                f"reuse_below is {config.reuse_below}, but the teacher has {depth} blocks: "
                f"give at most {depth - 1}"
            )

    @property
    def sampled_network(self) -> nn.Module:
        return self.student.denoiser.network  # type: ignore[union-attr, return-value]
