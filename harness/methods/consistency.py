"""Consistency distillation (Song et al. 2023, arXiv 2303.01469, alg. 2).

`f(x_t, t)` maps every point of an ODE path to its end. Let t > s be neighbours on a grid, x_s one
step of the guided teacher from `x_t = alpha_t x_0 + sigma_t eps`, and f^- the target average:

    L = E d(f(x_t, t), sg f^-(x_s, s)),    f(x_0, 0) = x_0

The network predicts eps or v, so f is its x_0-prediction, `x_hat - sigma_ve eps` in
sigma_ve = sigma / alpha. It is the identity at t = 0, hence the paper's smin is 0.

The paper's f has c_out at most sigma_data, so its gradient is bounded. An eps network has
c_out = sigma_ve, 157 at pure noise. Its differences are therefore taken times alpha_t, after which
the gradient is that of a v network (`DenoisingStudent.conditioned`).

By default the grid is that of the task's trajectories and the solver is DDIM. So a perfect student
reaches the ends of the teacher's stored trajectories. The paper uses Karras' grid, Heun and RAdam
in place of AdamW. Sampling in several steps alternates f and fresh noise (alg. 1).

Untrained: the first step is the unguided teacher's x_0-prediction. Exact: the loss is 0 at the map
that takes the teacher's remaining steps on the grid.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Guided
from harness.diffusion.schedules import Schedule, few_step_levels
from harness.errors import UsageError
from harness.methods.base import METHODS, Batch, Problem
from harness.methods.parts.options import Span
from harness.methods.parts.student import DenoisingStudent, HuberConfig, largest_sigma
from harness.solvers import SOLVERS, Solver


def karras_levels(
    count: int, schedule: Schedule, rho: float = 7.0, smallest: float = 0.002
) -> Tensor:
    """`count` timesteps from 1 to sigma_ve = `smallest`, even in sigma_ve^(1/rho), then 0.

    Source: Karras et al. 2022, arXiv 2206.00364, eq. 5. The step to 0 is added: the paper's map
    ends at `smallest`.
    """
    ends = torch.tensor([largest_sigma(schedule), smallest], dtype=torch.float64) ** (1 / rho)
    ramp = torch.linspace(0, 1, count, dtype=torch.float64)
    levels = schedule.time_of((ends[0] + ramp * (ends[1] - ends[0])) ** rho)
    return torch.cat(
        [torch.ones(1, dtype=torch.float64), levels[1:], torch.zeros(1, dtype=torch.float64)]
    )


class ConsistencyConfig(HuberConfig):
    grid: Literal["task", "karras"] = "task"
    """Grid of the teacher's steps: the task's trajectory levels, or Karras' levels with rho 7."""
    grid_levels: int = Field(18, ge=2, le=1000)
    """Number of levels of Karras' grid."""
    solver: Literal["ddim", "heun"] = "ddim"
    """The teacher's solver."""
    target_half_life: float = Field(13.5, gt=0, le=1e6)
    """Half-life of the target average in steps (paper: decay 0.95, which is 13.5)."""


class GridDistillation(DenoisingStudent):
    """A consistency function on a grid; subclasses set the grid and the teacher's solver."""

    any_step = True
    grid: Tensor
    teacher_solver: Solver

    def teacher_and_condition(self, batch: Batch, cond: Condition) -> tuple[Guided, Condition]:
        """The guided teacher and the student's condition for a batch."""
        return self.teacher, cond

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.data is not None
        x_0, cond = batch.data
        place = (batch.uniform("level") * (len(self.grid) - 1)).long()
        t, s = (self.grid.to(x_0.device)[i] for i in (place, place + 1))
        teacher, student_cond = self.teacher_and_condition(batch, cond)
        x_t = self.noised(x_0, batch.normal("eps", x_0.shape[1:]), t)
        with torch.no_grad():
            x_s, _, _ = self.teacher_solver.step(teacher, x_t, t, s, cond, None, None)
            clean = (s == 0).reshape(-1, 1, 1, 1)
            target = torch.where(clean, x_s, self.target_model(x_s, s, student_cond).x_0)
        off = self.model(x_t, t, student_cond).x_0 - target
        distance = self.config.distance(self.conditioned(off, t))
        return distance.mean(), {"mse": off.detach().square().mean()}


@METHODS.register("consistency-distillation")
class ConsistencyDistillation(GridDistillation):
    """Consistency distillation: neighbouring points of a teacher ODE path map to the same x_0."""

    Config = ConsistencyConfig
    tunes: ClassVar = {
        "lr": Span(1e-4, 1e-2, log=True),
        "loss": ("huber", "l2"),
        "target_half_life": Span(3.0, 100.0, log=True),
    }
    reference: ClassVar = (
        "Song et al. 2023, arXiv 2303.01469, alg. 1 and 2; "
        "pseudo-Huber: Song & Dhariwal 2023, arXiv 2310.14189, eq. 8"
    )

    def __init__(
        self,
        config: ConsistencyConfig,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        super().__init__(config, teacher, task, num_steps, total_steps, config.target_half_life)
        self.teacher_solver = SOLVERS[config.solver]()
        self.grid = few_step_levels(task.trajectory_steps)
        if config.grid == "karras":
            self.grid = karras_levels(
                config.grid_levels, task.schedule, smallest=0.002 * task.data_std / 0.5
            )
            trained = torch.linspace(0, len(self.grid) - 1, num_steps + 1).round().long()
            self.levels = self.grid[trained]

    @classmethod
    def reads_data(cls, config: Any, total_steps: int) -> bool:
        return super().reads_data(config, total_steps) or config.grid == "karras"

    @classmethod
    def canonical(cls, config: Any, num_steps: int) -> tuple[str, Any]:
        idle = (
            {"grid_levels": cls.Config.model_fields["grid_levels"].default}
            if config.grid == "task"
            else {}
        )
        return METHODS.name_of(cls), config.model_copy(update=idle)

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        if config.grid == "karras" and num_steps > config.grid_levels:
            raise UsageError(
                f"num_steps is {num_steps}, but the grid has {config.grid_levels} levels: "
                "give fewer steps or more grid_levels"
            )
        if config.grid == "task" and task.trajectory_steps % num_steps:
            raise UsageError(
                f"num_steps is {num_steps}, but must divide the {task.trajectory_steps} levels "
                "of the task's grid, so that sampling starts steps at trained levels; "
                "or give grid 'karras'"
            )
