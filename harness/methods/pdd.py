"""PDD, parallel decoding distillation (arXiv 2607.26004, and NVIDIA's port in Model-Optimizer).

The teacher's solver takes N intervals of flow time, `tau_0 = 1 > ... > tau_N = 0`. One pass of the
student at tau_n gives the velocities V_n .. V_{N-1} of all that follow, by a copy of the last
linear layer for each. A head learns the teacher's velocity at the point to which the heads before
it lead:

    x_k = sg(x_n + sum_{j=n}^{k-1} (tau_{j+1} - tau_j) V_j)
    L = |V_k - sg v_T(x_k, tau_k)|^2

or the teacher's midpoint velocity over interval k (`slope`). n is a multiple of N / `starts`, k is
uniform in the intervals that follow, and x_n is noised data. The grid is
`tau = s u / (1 + (s - 1) u)` of equal parts u (`shift`).

A step of the sampler is a block of intervals. Its mean velocity is that of one linear layer with
the mean of the heads' weights, so it costs one pass and is DDIM's step. The teacher is guided;
the student needs no guidance.

Ours: N is 32 (port: 128, with blocks of 4 to 64), and the grid begins at t = 1 (port: 0.999). The
error of an eps network is taken times alpha (`DenoisingStudent.conditioned`). The data-free
variant, which carries x_n along, is not here.

Untrained, from the teacher's weights: every head is the unguided teacher's velocity at x_n, so the
student is the unguided teacher under S-step DDIM. Exact: the loss is 0 where the heads are the
velocities of the teacher's own solver on the grid.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Denoiser, Guided, expand_to
from harness.errors import UsageError
from harness.methods.base import METHODS, Batch, Problem
from harness.methods.parts.heads import block_velocities
from harness.methods.parts.options import Span
from harness.methods.parts.samplers import Jumps
from harness.methods.parts.student import DenoisingStudent, StudentConfig, time_of_flow
from harness.networks.backbones import Backbone
from harness.networks.parallel import with_parallel_heads


class PDDConfig(StudentConfig):
    intervals: int = Field(32, ge=1, le=4096)
    """Number N of the teacher's solver intervals, each with a head (port: 128)."""
    starts: int = Field(4, ge=1, le=4096)
    """Number of places where a block may start; it must divide `intervals` (port: 32)."""
    longest: float = Field(1.0, gt=0, le=1)
    """Longest block, as a part of all intervals (port: 0.5, which excludes one step)."""
    shift: float = Field(5.0, gt=0, le=100)
    """How much the grid is shifted to noise; 1 is equal intervals."""
    slope: Literal["euler", "midpoint"] = "euler"
    """The teacher's velocity of an interval: at its start, or at its middle by a second pass."""


def flow_grid(intervals: int, shift: float, largest: float) -> Tensor:
    """Flow times tau_0 = `largest` > ... > tau_N = 0, float64 [N + 1]."""
    return largest * shifted(torch.linspace(1, 0, intervals + 1, dtype=torch.float64), shift)


def shifted(u: Tensor, shift: float) -> Tensor:
    """Times in [0, 1] that are shifted to noise."""
    return shift * u / (1 + (shift - 1) * u)


@METHODS.register("pdd")
class PDD(DenoisingStudent):
    """Parallel decoding distillation: one pass gives the velocities of many solver intervals."""

    Config = PDDConfig
    tunes: ClassVar = {
        "lr": Span(1e-5, 1e-2, log=True),
        "intervals": (16, 32, 64),
        "shift": (1.0, 3.0, 5.0),
        "slope": ("euler", "midpoint"),
    }
    any_step = True
    target = "guided teacher"
    reference: ClassVar = "arXiv 2607.26004"

    def __init__(
        self,
        config: PDDConfig,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        self.schedule = task.schedule
        self.taus = flow_grid(config.intervals, config.shift, self.largest_tau)
        self.grid = time_of_flow(task.schedule, self.taus)
        self.grid[0], self.grid[-1] = 1, 0
        super().__init__(config, teacher, task, num_steps, total_steps)
        self.levels = self.grid[:: config.intervals // num_steps]
        self.solver = Jumps(lambda t, s: {"first": self.place(t), "last": self.place(s)})

    def new_network(self, config: Any, task: Problem) -> Backbone:
        return with_parallel_heads(super().new_network(config, task), -self.taus.diff())

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        if config.intervals % config.starts:
            raise UsageError(
                f"starts is {config.starts}, but must divide intervals, which is {config.intervals}"
            )
        if config.starts % num_steps:
            raise UsageError(
                f"num_steps is {num_steps}, but must divide starts, which is {config.starts}"
            )
        if config.longest * num_steps < 1:
            raise UsageError(
                f"longest is {config.longest:g}, but a block of {num_steps} steps is "
                f"{1 / num_steps:g} of all intervals: give that or more"
            )

    def place(self, t: Tensor) -> Tensor:
        """The place of a timestep in the grid, 0-d."""
        return (self.grid - t).abs().argmin().float()

    def blocks(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The interval n where a sample starts, and the one k >= n that is learnt, int64 [B]."""
        count, starts = self.config.intervals, self.config.starts
        n = (batch.uniform("start") * starts).long() * (count // starts)
        width = torch.clamp(count - n, max=max(1, round(self.config.longest * count)))
        return n, n + (batch.uniform("interval") * width).long()

    def velocities(
        self, x_t: Tensor, t: Tensor, cond: Condition, first: Tensor, last: Tensor
    ) -> Tensor:
        """The student's mean velocities over R blocks for each sample (`block_velocities`)."""
        return block_velocities(self.model, x_t, t, cond, first, last)

    @torch.no_grad()
    def teachers(self, y: Tensor, k: Tensor, cond: Condition) -> Tensor:
        """The guided teacher's velocity over interval k [B] from points y [B, C, H, W] there."""
        taus = self.taus.to(y.device)
        tau, length = taus[k], taus[k + 1] - taus[k]
        teacher: Denoiser = self.teacher  # type: ignore[assignment]
        found = self.velocity_at(teacher, y, tau, cond)
        if self.config.slope == "euler":
            return found
        half = length / 2
        return self.velocity_at(teacher, y + expand_to(half, y) * found, tau + half, cond)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.data is not None
        x_0, cond = batch.data
        n, k = self.blocks(batch)
        taus, grid = self.taus.to(x_0.device), self.grid.to(x_0.device)
        eps, t, tau = batch.normal("eps", x_0.shape[1:]), grid[n], taus[n]
        before, own = self.velocities(
            self.noised(x_0, eps, t),
            t,
            cond,
            torch.stack([n, k]),
            torch.stack([torch.maximum(k, n + 1), k + 1]),
        )
        y = expand_to(1 - tau, x_0) * x_0 + expand_to(tau, x_0) * eps
        y = y + expand_to(taus[k] - tau, x_0) * before.detach()
        off = self.conditioned(own - self.teachers(y, k, cond), t)
        return off.square().mean(), {"mse": off.detach().square().mean()}
