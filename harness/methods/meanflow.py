"""MeanFlow (Geng et al. 2025, arXiv 2505.13447): the mean velocity between two times.

With the flow's velocity v, the mean velocity u(x_t, r, t) over [r, t] satisfies
`u = v - (t - r) du/dt` (eq. 6). du/dt is the derivative along (v, 0, 1) in (x, r, t), by forward
mode (eq. 9 to 11 and 22):

    L = w |u(x_t, r, t) - sg(v - (t - r) du/dt)|^2,    w = 1 / (|.|^2 + c)^p

For most of a batch r = t, which is flow matching. v is eps - x_0 of data and noise (`source: data`,
as in the paper) or the guided teacher's velocity (`source: teacher`). A jump is
x_r = x_t - (t - r) u; one step from noise gives x_0 = eps - u.

Ours: p is 0 with the teacher's velocity. The data's velocity is noisy, so all errors are alike and
the paper's p = 1 only divides the loss. The teacher's is not: with p = 1 the rows with r = t, which
fit from the start, would have nearly all the weight, and the student hardly leaves the teacher.

Times are flow times (`parts/flow_map.py`). The network is told r, or t - r as in the released code
(`second_time`). An eps network's error is taken times alpha_t (`DenoisingStudent.conditioned`).

The paper's logit-normal times are above t = 0.95 in 8 of 10,000 samples, but one step starts at
t = 1. So a share `uniform` of a batch has uniform t and r, and a share `one_step` t = 1 and r = 0.

On a guided task the velocity of data is guided as in the paper's appendix, with the student's own
instantaneous velocities (`omega`, `kappa`); the effective scale is omega / (1 - kappa):

    v = omega (eps - x_0) + (1 - omega - kappa) u(x_t, t, t | null) + kappa u(x_t, t, t | c)

Untrained, from the teacher's weights: the student is the unguided teacher under S-step DDIM. In
expectation: the error has mean 0 at the exact mean velocity.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Guided, expand_to
from harness.methods.base import METHODS, Batch, Problem
from harness.methods.parts.derivatives import DerivativeConfig
from harness.methods.parts.flow_map import FlowMap, PairConfig
from harness.methods.parts.options import Span
from harness.methods.parts.student import time_of_flow


class MeanFlowConfig(PairConfig, DerivativeConfig):
    source: Literal["data", "teacher"] = "data"
    """The velocity v: of data and noise, or of the guided teacher."""
    omega: float | None = Field(None, ge=0, le=100)
    """Weight of the data's velocity under guidance; none is (1 - kappa) times the task's scale."""
    kappa: float = Field(0.0, ge=0, lt=1)
    """Weight of the student's own conditional velocity under guidance."""

    @model_validator(mode="before")
    @classmethod
    def _plain_from_teacher(cls, given: Any) -> Any:
        """The teacher's velocity has no noise, so rows that fit already would weigh most."""
        if isinstance(given, dict) and given.get("source") == "teacher":
            return {"power": 0.0, **given}
        return given


@METHODS.register("meanflow")
class MeanFlow(FlowMap):
    """MeanFlow: a network for the mean velocity between two times, trained by its own identity."""

    Config = MeanFlowConfig
    tunes: ClassVar = {
        "lr": Span(1e-5, 1e-2, log=True),
        "distinct": (0.25, 0.5, 0.75),
        "power": (0.0, 0.5, 0.75, 1.0),
        "one_step": (0.02, 0.05, 0.2),
    }
    target = "data"
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
        omega = task.guidance_scale * (1 - config.kappa) if config.omega is None else config.omega
        self.omega, self.guided = omega, omega + config.kappa != 1
        by_data = "guided data" if self.guided else "data"
        self.target = "guided teacher" if config.source == "teacher" else by_data

    @torch.no_grad()
    def guided_velocity(
        self, v: Tensor, y: Tensor, tau: Tensor, cond: Condition, dropped: Tensor
    ) -> Tensor:
        """The data's velocities v at points y, guided where the label is not dropped [B]."""
        everywhere, kappa = torch.ones_like(tau, dtype=torch.bool), self.config.kappa
        with torch.autocast(y.device.type, enabled=False):  # like the student in the JVP
            null = self.u(y, tau, tau, cond.replaced(everywhere, self.task.null))
            own = self.u(y, tau, tau, cond) if kappa else v
        guided = self.omega * v + (1 - self.omega - kappa) * null + kappa * own
        return torch.where(dropped.reshape(-1, 1, 1, 1), v, guided)

    def points(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Condition]:
        """Flow times rho <= tau [B], points y of the line at tau, velocities v there, conditions.

        The velocities are those of data and noise, guided if the task is, or the teacher's.
        """
        assert batch.data is not None
        x_0, cond = batch.data[0], self.with_dropout(batch, batch.data[1])
        rho, tau = self.spread(batch, self.config.pair(batch), self.config.distinct)
        eps = batch.normal("eps", x_0.shape[1:])
        y = expand_to(1 - tau, x_0) * x_0 + expand_to(tau, x_0) * eps
        t, v = time_of_flow(self.schedule, tau), eps - x_0
        if self.config.source == "teacher":
            v = self.teachers(x_0, eps, t, cond)
        elif self.guided:
            v = self.guided_velocity(v, y, tau, cond, self.dropped(batch))
        return rho, tau, y, v, cond

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        rho, tau, y, v, cond = self.points(batch)
        u, change = self.along(lambda y, rho, tau: self.u(y, rho, tau, cond), y, rho, tau, v)
        off = u - (v - expand_to(tau - rho, y) * change)
        t = time_of_flow(self.schedule, tau)
        error = self.config.weighted(self.conditioned(off, t))
        return error.mean(), {"mse": off.detach().square().mean()}
