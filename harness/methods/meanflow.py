"""MeanFlow (Geng et al. 2025, arXiv 2505.13447): the mean velocity between two times.

With the flow's velocity v, the mean velocity u(x_t, r, t) over [r, t] satisfies
`u = v - (t - r) du/dt` (eq. 6). du/dt is the derivative along (v, 0, 1) in (x, r, t), by forward
mode (eq. 9 to 11 and 22):

    L = w |u(x_t, r, t) - sg(v - (t - r) du/dt)|^2,    w = 1 / (|.|^2 + c)^p

For most of a batch r = t, which is flow matching. v is eps - x_0 of data and noise (`source: data`,
as in the paper) or the guided teacher's velocity (`source: teacher`). A jump is
x_r = x_t - (t - r) u; one step from noise gives x_0 = eps - u.

Times are flow times. The network is the task's own with r as an input (`parts/student.py`).

Untrained, from the teacher's weights: the student is the unguided teacher under S-step DDIM. In
expectation: the error has mean 0 at the exact mean velocity.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.counting import jvp
from harness.diffusion.denoiser import Guided, expand_to
from harness.methods.base import METHODS, Batch, Problem
from harness.methods.parts.student import (
    DenoisingStudent,
    Jumps,
    StudentConfig,
    time_of_flow,
    velocity,
)


class MeanFlowConfig(StudentConfig):
    source: Literal["data", "teacher"] = "data"
    """The velocity v: of data and noise, or of the guided teacher."""
    distinct: float = Field(0.25, ge=0, le=1)
    """Share of a batch with r different from t."""
    level_mean: float = Field(-0.4, ge=-10, le=10)
    """Mean of the logit of times."""
    level_std: float = Field(1.0, gt=0, le=10)
    """Standard deviation of the logit of times."""
    power: float = Field(1.0, ge=0, le=2)
    """Power p of the adaptive weight; 0 is the plain squared error."""
    weight_floor: float = Field(1e-3, gt=0, le=1e3)
    """Constant c of the adaptive weight."""


@METHODS.register("meanflow")
class MeanFlow(DenoisingStudent):
    """MeanFlow: a network for the mean velocity between two times, trained by its own identity."""

    Config = MeanFlowConfig
    any_step = True
    target = "data"
    scalars = ("target",)
    reference: ClassVar = "Geng et al. 2025, arXiv 2505.13447, eq. 6 to 11 and alg. 1"

    def __init__(
        self,
        config: MeanFlowConfig,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        super().__init__(config, teacher, task, num_steps, total_steps)
        self.target = "guided teacher" if config.source == "teacher" else "data"
        self.solver = Jumps(lambda t, s: {"target": self.schedule.network_time(s)})

    def u(self, y: Tensor, rho: Tensor, tau: Tensor, cond: Condition) -> Tensor:
        """The student's mean velocity over flow times [rho, tau], at points y [B, C, H, W]."""
        cond = cond.with_scalars(
            target=self.schedule.network_time(time_of_flow(self.schedule, rho))
        )
        return self.velocity_at(self.model, y, tau, cond)

    def times(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Flow times rho <= tau, float64 [B] each."""
        pair = torch.stack([batch.normal(name, ()).double() for name in ("tau", "rho")])
        pair = torch.sigmoid(self.config.level_mean + self.config.level_std * pair).clamp(
            1e-3, self.largest_tau
        )
        tau, rho = pair.amax(0), pair.amin(0)
        return torch.where(batch.uniform("distinct") < self.config.distinct, rho, tau), tau

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.data is not None
        x_0, cond = batch.data
        rho, tau = self.times(batch)
        eps = batch.normal("eps", x_0.shape[1:])
        y = expand_to(1 - tau, x_0) * x_0 + expand_to(tau, x_0) * eps
        v = eps - x_0
        if self.config.source == "teacher":
            t = time_of_flow(self.schedule, tau)
            # Like the student in the JVP: in bf16 its rounding would hide how the two differ.
            with torch.no_grad(), torch.autocast(x_0.device.type, enabled=False):
                v = velocity(self.teacher(self.noised(x_0, eps, t), t, cond))
        u, change = jvp(
            lambda y, rho, tau: self.u(y, rho, tau, cond),
            (y, rho, tau),
            (v, torch.zeros_like(rho), torch.ones_like(tau)),
        )
        off = u - (v - expand_to(tau - rho, x_0) * change.detach())
        error = off.square().flatten(1).sum(1)
        weight = (error.detach() + self.config.weight_floor) ** -self.config.power
        return (weight * error).mean(), {"mse": off.detach().square().mean()}
