"""Shortcut models (Frans et al. 2024, arXiv 2410.12557): a flow with the step size as an input.

Most of a batch is flow matching with step size 0. In the rest a step of 2d learns the mean of two
steps of d, of which the second starts where the first ends (alg. 1):

    L = |s(x_t, t, 0) - (eps - x_0)|^2
    L = |s(x_t, t, 2d) - sg (s(x_t, t, d) + s(x', t', d)) / 2|^2,    x' = x_t - d s(x_t, t, d)

d is 1/M, ..., 1/4, 1/2, and t is a multiple of 2d. As in the paper, the smallest d enters as 0, and
targets come from the average, and weight decay 0.1 keeps short steps near 0.

On a guided task the smallest bootstrapped steps alone are guided, at the task's scale, and larger
ones inherit it (the released code's `bootstrap_cfg`). d = 0 stays unguided.

An eps network's difference of velocities is taken times alpha_t (`DenoisingStudent.conditioned`).

Times are flow times, and the sampler takes equal steps in them. The network is the task's own
(`parts/student.py`). The method learns the distribution of the data.

Untrained, from the teacher's weights: the student is the unguided teacher under DDIM on the same
levels. In expectation: the gradient is 0 if each s(., d) is the flow's mean velocity over d, and
s(., 0) is E[eps - x_0 | x_t].
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Denoiser, Guided, expand_to
from harness.errors import UsageError
from harness.methods.base import METHODS, Batch, Problem
from harness.methods.parts.options import Span
from harness.methods.parts.samplers import Jumps
from harness.methods.parts.student import DataConfig, DenoisingStudent, time_of_flow


class ShortcutConfig(DataConfig):
    weight_decay: float = Field(0.1, ge=0, le=10)
    """Weight decay of AdamW."""
    bootstrap: float = Field(0.125, ge=0, le=1)
    """Share of a batch that learns from two smaller steps."""
    finest: int = Field(128, ge=4, le=1024)
    """Number M of the smallest steps, a power of 2."""
    bootstrap_guidance: float | None = Field(None, ge=0, le=100)
    """Guidance scale of the smallest bootstrapped steps; none is the task's scale."""

    @property
    def counted_samples(self) -> int:
        """Enough for bootstrapped samples of each size, with a whole number of them."""
        counts = (count for count in range(64, 200) if (count * self.bootstrap).is_integer())
        return next(counts, 200)


@METHODS.register("shortcut")
class Shortcut(DenoisingStudent):
    """Shortcut models: a flow conditioned on step size, one step of which matches two halves."""

    Config = ShortcutConfig
    tunes: ClassVar = {
        "lr": Span(1e-5, 1e-2, log=True),
        "bootstrap": (0.125, 0.25, 0.5),
        "weight_decay": (0.0, 0.01, 0.1),
    }
    any_step = True
    scalars = ("step_size",)
    target = "data"
    reference: ClassVar = "Frans et al. 2024, arXiv 2410.12557, eq. 4 and 5, alg. 1"

    def __init__(
        self,
        config: ShortcutConfig,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        super().__init__(config, teacher, task, num_steps, total_steps)
        given = config.bootstrap_guidance
        self.scale = task.guidance_scale if given is None else given
        self.target = "data" if self.scale == 1 else "guided data"
        assert self.student_player.ema is not None
        self.target_model = self.as_denoiser(self.student_player.ema.module)
        self.levels = time_of_flow(
            self.schedule, torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        )
        step_size = torch.tensor(1000 / num_steps)
        self.solver = Jumps(lambda t, s: {"step_size": step_size})

    @classmethod
    def shards(cls, config: Any) -> bool:
        return False  # a rank without a sample of the bootstrap's share makes fewer passes

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        for name, number in (("num_steps", num_steps), ("finest", config.finest)):
            if number & (number - 1):
                raise UsageError(
                    f"{name} is {number}, but shortcut models double their steps: give a power of 2"
                )
        if num_steps > config.finest // 2:
            raise UsageError(
                f"num_steps is {num_steps}, but the smallest trained step is "
                f"{2 / config.finest:g}: give at most {config.finest // 2}"
            )

    def s(self, model: Denoiser, y: Tensor, tau: Tensor, step: Tensor, cond: Condition) -> Tensor:
        """The mean velocity over a step from points y [B, C, H, W] of the line."""
        return self.velocity_at(model, y, tau, cond.with_scalars(step_size=1000 * step))

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.data is not None
        x_0, cond = batch.data[0], self.with_dropout(batch, batch.data[1])
        eps, share = batch.normal("eps", x_0.shape[1:]), self.config.bootstrap
        index = batch.index.double()  # float32 cannot count the samples of a long run
        booted = ((index + 1) * share).floor() > (index * share).floor()
        d = (
            2.0
            ** -(
                1 + (batch.uniform("size") * (self.config.finest.bit_length() - 1)).long()
            ).double()
        )
        place = 1 + (batch.uniform("t") / (2 * d)).long()
        tau = torch.where(booted, place * 2 * d, batch.uniform("t")).clamp(1e-3, self.largest_tau)
        y = expand_to(1 - tau, x_0) * x_0 + expand_to(tau, x_0) * eps
        target = eps - x_0
        if bool(booted.any()):
            target[booted] = self.two_steps(y[booted], tau[booted], d[booted], cond[booted])
        off = self.s(self.model, y, tau, torch.where(booted, 2 * d, 0.0), cond) - target
        t = time_of_flow(self.schedule, tau)
        return self.conditioned(off, t).square().mean(), {"mse": off.detach().square().mean()}

    @torch.no_grad()
    def two_steps(self, y: Tensor, tau: Tensor, d: Tensor, cond: Condition) -> Tensor:
        """The average's mean velocity over two steps of d, clipped as in the released code."""
        first = self.guided(y, tau, d, cond)
        halfway = (tau - d).clamp(min=1e-6)
        second = self.guided(y - expand_to(tau - halfway, y) * first, halfway, d, cond)
        return ((first + second).to(y) / 2).clamp(-4, 4)

    def guided(self, y: Tensor, tau: Tensor, d: Tensor, cond: Condition) -> Tensor:
        """The average's velocity over a step of d, guided where d is the smallest."""
        smallest = d * self.config.finest <= 1
        step = torch.where(smallest, 0.0, d)
        found = self.s(self.target_model, y, tau, step, cond).clone()
        rows = smallest.nonzero().squeeze(1)
        if self.scale == 1 or len(rows) == 0:
            return found
        everywhere = torch.ones_like(rows, dtype=torch.bool)
        null = cond[rows].replaced(everywhere, self.task.null)
        without = self.s(self.target_model, y[rows], tau[rows], step[rows], null)
        found[rows] = without + self.scale * (found[rows] - without)
        return found
