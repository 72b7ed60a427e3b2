"""Consistency trajectory models (Kim et al. 2023, arXiv 2310.02279).

The student jumps from any t to any s <= t, `G(x_t, t, s) = (s/t) x_t + (1 - s/t) g(x_t, t, s)`
(eq. 3). In sigma / alpha this is DDIM's step with a prediction g that has s as an input.

For t > u >= s on a grid, a direct jump from t to s must end where a short teacher solve from t to u
and a jump of the slow average from u to s end. The slow average maps both ends to t = 0 (eq. 6, 8
and 9):

    L = d(G^-(G(x_t, t, s), s, 0), G^-(G^-(solve(x_t, t, u), u, s), s, 0))
        + dsm |g(x_t, t, t) - x_0|^2

The paper's GAN is missing, and the weight of denoising is fixed. Denoising learns from data without
guidance, so by default a guided teacher does without it. Its error is that of the network's own
output, which is EDM's weight 1 / c_out^2. A jump's difference is taken times alpha_t for an eps
network, whose errors move the jump's end by 1 / alpha_t times as much as a v network's
(`DenoisingStudent.conditioned`). The teacher solves as many steps as each sample needs.

Untrained: the student is the unguided teacher under S-step DDIM. In expectation: at the exact jumps
of the teacher's solver on the grid the first part is 0, and denoising has no mean gradient at
E[x_0 | x_t].
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Denoiser, Guided, Prediction
from harness.diffusion.schedules import few_step_levels
from harness.errors import UsageError
from harness.methods.base import METHODS, Batch, Problem
from harness.methods.parts.options import Span
from harness.methods.parts.samplers import Jumps
from harness.methods.parts.student import DenoisingStudent, HuberConfig
from harness.solvers.ddim import ddim_step


class CTMConfig(HuberConfig):
    solver_steps: int = Field(3, ge=1, le=100)
    """Largest number of grid steps that the teacher solves before the slow average jumps."""
    dsm: float | None = Field(None, ge=0, le=1e6)
    """Weight of denoising score matching, which learns from data without guidance; none is 1 if
    the teacher is unguided and 0 otherwise."""
    target_half_life: float = Field(13.5, gt=0, le=1e6)
    """Half-life of the slow average in steps."""

    @property
    def counted_samples(self) -> int:
        """Enough for each number of the teacher's steps to have its share."""
        return 64


@METHODS.register("ctm")
class CTM(DenoisingStudent):
    """Consistency trajectory models: a jump matches a short teacher solve followed by a jump."""

    Config = CTMConfig
    tunes: ClassVar = {
        "lr": Span(1e-4, 1e-2, log=True),
        "loss": ("huber", "l2"),
        "solver_steps": (1, 3, 6),
        "target_half_life": Span(3.0, 100.0, log=True),
    }
    any_step = True
    scalars = ("target",)
    reference: ClassVar = "Kim et al. 2023, arXiv 2310.02279, eq. 3 to 9"

    @classmethod
    def shards(cls, config: Any) -> bool:
        return False  # the solver takes as many steps as a rank's samples need

    def __init__(
        self,
        config: CTMConfig,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        super().__init__(config, teacher, task, num_steps, total_steps, config.target_half_life)
        self.solver = Jumps(lambda t, s: {"target": self.schedule.network_time(s)})
        self.grid = few_step_levels(task.trajectory_steps)
        unguided = task.guidance_scale == 1
        self.dsm = float(unguided) if config.dsm is None else config.dsm

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        if task.trajectory_steps % num_steps:
            raise UsageError(
                f"num_steps is {num_steps}, but must divide the {task.trajectory_steps} levels "
                "of the task's grid"
            )

    def predict(
        self, model: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition
    ) -> Prediction:
        """g with the target s as an input."""
        return model(x_t, t, cond.with_scalars(target=self.schedule.network_time(s)))

    def jump(self, model: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """G from t to s, [B] each; the identity where t = s."""
        there = ddim_step(self.predict(model, x_t, t, s, cond), s, self.schedule)
        return torch.where((t > s).reshape(-1, 1, 1, 1), there, x_t)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.data is not None
        x_0, cond = batch.data
        grid, last = self.grid.to(x_0.device), len(self.grid) - 1
        eps = batch.normal("eps", x_0.shape[1:])
        at_t = (batch.uniform("t") * last).long()
        ahead = 1 + (batch.uniform("u") * (last - at_t).clamp(max=self.config.solver_steps)).long()
        at_s = at_t + ahead + (batch.uniform("s") * (last - at_t - ahead + 1)).long()
        t, s, u, end = grid[at_t], grid[at_s], grid[at_t + ahead], torch.zeros_like(grid[at_t])
        x_t = self.noised(x_0, eps, t)
        with torch.no_grad():
            x_u = self.solved(x_t, at_t, ahead, grid, cond)
            target = self.jump(
                self.target_model, self.jump(self.target_model, x_u, u, s, cond), s, end, cond
            )
        found = self.jump(self.target_model, self.jump(self.model, x_t, t, s, cond), s, end, cond)
        consistency = self.config.distance(self.conditioned(found - target, t)).mean()
        metrics = {"consistency": consistency.detach()}
        if not self.dsm:
            return consistency, metrics
        itself = self.predict(self.model, x_t, t, t, cond)
        denoising = self.output_error(itself, x_0, eps, t).square().mean()
        return consistency + self.dsm * denoising, metrics | {"denoising": denoising.detach()}

    def solved(
        self, x_t: Tensor, at_t: Tensor, ahead: Tensor, grid: Tensor, cond: Condition
    ) -> Tensor:
        """The teacher's points `ahead` [B] steps after places `at_t` [B] of the grid."""
        x_u = x_t.clone()
        for i in range(int(ahead.max())):
            rows = (ahead > i).nonzero().squeeze(1)
            here, there = (grid[at_t[rows] + i + j] for j in (0, 1))
            x_u[rows] = ddim_step(self.teacher(x_u[rows], here, cond[rows]), there, self.schedule)
        return x_u
