"""TCM, truncated consistency models (Lee et al. 2024, arXiv 2410.14895; FastGen's code).

Stage 1 is easy consistency tuning (ECT, `consistency_training.py`). Its average is then frozen, as
f_1, and a copy goes on in stage 2, at noise levels sigma (sigma / alpha) above sigma' = 1 alone.
Its capacity there goes into generation. f_1 stands below sigma':

    f(x, t) = the student if sigma_t >= sigma', else f_1
    L = w d(f(x_t, t), sg f(x_r, r)),    w = 1 / (sigma_t - sigma_r),    x_r of the same noise

r is ECT's, whose stages go on counting. A quarter of the samples have sigma_t = sigma', where f_1
gives the target. This boundary keeps f from a constant, and its mean has the weight 0.1. Other
levels follow a Student's t of log sigma, cut to the range from sigma' to pure noise. Its 0.01
degrees of freedom make its density nearly 1 / |log sigma|.

A sampling step starts at pure noise, and one at sigma' is the last: in two steps the paper's
levels. More steps lie at equal timesteps between, so the student takes all of them.

Decided here, where paper and code leave it open: both stages are in one run, which is billed for
both. Stage 2 begins at a part of the run (`truncate_from`), with its own optimizer, average and
learning rate schedule. Ours: the density is (1 + x^2 / 0.01)^(-1/2) with
x = log(sigma / sigma') / 0.2, where the exponent of Student's t is -0.505, so that its quantiles
have a formula. A share `uniform` of a batch has uniform timesteps above sigma'. Whether a sample is
at the boundary is drawn, so the two means are weights. No dropout. sigma' is the paper's for
sigma_data 0.5, scaled to the task's.

f learns the distribution of the data without guidance. Untrained, from the teacher's weights: the
first step is the unguided teacher's x_0-prediction. Exact: with x_r on the ODE through x_t, L is 0
at its end. In expectation: as for ECT, where f is one map.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from harness.diffusion.denoiser import Guided
from harness.methods.base import METHODS, Batch, Problem, Update
from harness.methods.consistency_training import ECT, ECTConfig
from harness.methods.parts.options import Span
from harness.methods.parts.players import cosine
from harness.methods.parts.student import largest_sigma, sigma_ve

DEGREES, SCALE = 0.01, 0.2
"""Degrees of freedom and scale of the t of log sigma (paper)."""


class TCMConfig(ECTConfig):
    truncate_from: float = Field(0.5, ge=0.2, lt=1)
    """Fraction of the run after which stage 2 begins; before 0.2 the average still holds much of
    the student's first weights."""
    boundary: float = Field(1.0, gt=0, le=50)
    """Noise level sigma' above which stage 2 trains, for sigma_data 0.5."""
    boundary_share: float = Field(0.25, gt=0, lt=1)
    """Share of a batch at the boundary."""
    boundary_weight: float = Field(0.1, gt=0, le=1e3)
    """Weight of the boundary's mean loss."""


@METHODS.register("tcm")
class TCM(ECT):
    """Truncated consistency models (TCM): ECT, then its noisy levels alone, on a frozen copy."""

    Config = TCMConfig
    tunes: ClassVar = {
        "lr": Span(1e-4, 1e-2, log=True),
        "stage_steps": (30, 60, 120),
        "truncate_from": (0.25, 0.5, 0.75),
        "boundary_weight": (0.03, 0.1, 0.3),
        "uniform": (0.1, 0.3, 0.6),
    }
    reference: ClassVar = "Lee et al. 2024, arXiv 2410.14895; FastGen's code"

    def __init__(
        self,
        config: TCMConfig,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        super().__init__(config, teacher, task, num_steps, total_steps)
        self.start = round(config.truncate_from * total_steps)
        self.student_player.rate = self.rate
        self.earlier = self.as_denoiser(
            copy.deepcopy(self.student_player.module).requires_grad_(False).eval()
        )
        sigma = torch.tensor(self.scaled(config.boundary), dtype=torch.float64)
        self.lowest = float(self.schedule.time_of(sigma))
        above = torch.linspace(1, self.lowest, num_steps, dtype=torch.float64)
        self.levels = torch.cat([above, torch.zeros(1, dtype=torch.float64)])

    @staticmethod
    def student_updates(config: Any, total_steps: int) -> int:
        return total_steps - round(config.truncate_from * total_steps)

    def rate(self, progress: float) -> float:
        """The factor of the learning rate: its whole schedule in each stage."""
        step, whole = round(progress * self.total_steps), cosine(self.config.warmup)
        if step <= self.start:
            return whole(step / self.start)
        return whole((step - self.start) / (self.total_steps - self.start))

    def updates(self, step: int) -> Iterable[Update]:
        if step < self.start:
            return [Update("student", partial(self.loss_at, step=step))]
        return [Update("student", partial(self.truncated_loss, step=step), "truncated")]

    def noisy(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Timesteps [B] of stage 2, and which of them are the boundary's."""
        lowest = self.scaled(self.config.boundary)
        longest = math.log(largest_sigma(self.schedule) / lowest) / SCALE
        root = math.sqrt(DEGREES)
        x = root * torch.sinh(batch.uniform("level") * math.asinh(longest / root))
        t = self.schedule.time_of(lowest * (SCALE * x).exp())
        even = self.lowest + (1 - self.lowest) * batch.uniform("uniform t")
        t = torch.where(batch.uniform("uniform") < self.config.uniform, even, t)
        bound = batch.uniform("boundary") < self.config.boundary_share
        return torch.where(bound, self.lowest, t.clamp(self.lowest, 1)), bound

    def truncated_loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of stage 2 at a step of the run."""
        assert batch.data is not None
        x_0, cond = batch.data[0], self.with_dropout(batch, batch.data[1])
        t, bound = self.noisy(batch)
        r, eps = self.before(t, step), batch.normal("eps", x_0.shape[1:])
        found = self.model(self.noised(x_0, eps, t), t, cond).x_0
        with torch.no_grad():
            x_r = self.noised(x_0, eps, r)
            above = self.model(x_r, r, cond).x_0
            below = self.earlier(x_r, r, cond).x_0
            target = torch.where((r >= self.lowest).reshape(-1, 1, 1, 1), above, below)
            target = torch.where((r == 0).reshape(-1, 1, 1, 1), x_0, target)
        off = found - target
        largest = largest_sigma(self.schedule)
        sigmas = (sigma_ve(self.schedule, level).clamp(max=largest) for level in (t, r))
        share = self.config.boundary_share
        means = torch.where(bound, self.config.boundary_weight / share, 1 / (1 - share))
        weight = (self.weight(*sigmas) * means).to(off)
        return (weight * self.config.distance(off)).mean(), {"mse": off.detach().square().mean()}

    def freeze(self, state: dict[str, Tensor]) -> None:
        """Gives f_1 these weights."""
        self.earlier.network.load_state_dict(state)

    def start_from(self, state: dict[str, Tensor]) -> None:
        super().start_from(state)
        self.freeze(state)

    def end_step(self, step: int, means: dict[str, float]) -> Collection[str]:
        if step + 1 != self.start:
            return ()
        assert self.student_player.ema is not None
        average = self.student_player.ema.module.state_dict()
        self.freeze(average)
        self.student_player.module.load_state_dict(average)
        return ("student",)

    @property
    def networks(self) -> list[nn.Module]:
        return [*super().networks, self.earlier]

    def state_dict(self) -> dict[str, Any]:
        return dict(self.earlier.network.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.freeze(state)
