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

Times are flow times. The network is the task's own with r as an input, or t - r as in the
released code (`second_time`). An eps network's error is taken times alpha_t
(`DenoisingStudent.conditioned`).

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
from harness.methods.parts.derivatives import STEP, DerivativeConfig, with_derivative
from harness.methods.parts.options import Span
from harness.methods.parts.samplers import Jumps
from harness.methods.parts.student import (
    DataConfig,
    DenoisingStudent,
    TimesConfig,
    flow_time,
    time_of_flow,
    velocity,
)


class MeanFlowConfig(DataConfig, TimesConfig, DerivativeConfig):
    source: Literal["data", "teacher"] = "data"
    """The velocity v: of data and noise, or of the guided teacher."""
    distinct: float = Field(0.25, ge=0, le=1)
    """Share of a batch with r different from t."""
    one_step: float = Field(0.05, ge=0, le=1)
    """Share of a batch with t = 1 and r = 0, where one-step sampling starts and ends."""
    second_time: Literal["r", "interval"] = "r"
    """What the network is told beside t: r, or t - r."""
    omega: float | None = Field(None, ge=0, le=100)
    """Weight of the data's velocity under guidance; none is (1 - kappa) times the task's scale."""
    kappa: float = Field(0.0, ge=0, lt=1)
    """Weight of the student's own conditional velocity under guidance."""
    level_mean: float = Field(-0.4, ge=-10, le=10)
    """Mean of the logit of times."""
    level_std: float = Field(1.0, gt=0, le=10)
    """Standard deviation of the logit of times."""
    power: float = Field(1.0, ge=0, le=2)
    """Power p of the adaptive weight; 0, which is the default with the teacher's velocity, is the
    plain squared error."""
    weight_floor: float = Field(1e-2, gt=0, le=1e3)
    """Constant c of the adaptive weight (released code: 0.01)."""

    @model_validator(mode="before")
    @classmethod
    def _plain_from_teacher(cls, given: Any) -> Any:
        """The teacher's velocity has no noise, so rows that fit already would weigh most."""
        if isinstance(given, dict) and given.get("source") == "teacher":
            return {"power": 0.0, **given}
        return given


@METHODS.register("meanflow")
class MeanFlow(DenoisingStudent):
    """MeanFlow: a network for the mean velocity between two times, trained by its own identity."""

    Config = MeanFlowConfig
    tunes: ClassVar = {
        "lr": Span(1e-5, 1e-2, log=True),
        "distinct": (0.25, 0.5, 0.75),
        "power": (0.5, 0.75, 1.0),
        "one_step": (0.02, 0.05, 0.2),
    }
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
        omega = task.guidance_scale * (1 - config.kappa) if config.omega is None else config.omega
        self.omega, self.guided = omega, omega + config.kappa != 1
        by_data = "guided data" if self.guided else "data"
        self.target = "guided teacher" if config.source == "teacher" else by_data
        self.solver = Jumps(self.told)

    def told(self, t: Tensor, s: Tensor) -> dict[str, Tensor]:
        """The network's second time, for a jump from t to s."""
        if self.config.second_time == "interval":
            return {"target": 1000 * (flow_time(self.schedule, t) - flow_time(self.schedule, s))}
        return {"target": self.schedule.network_time(s)}

    def u(self, y: Tensor, rho: Tensor, tau: Tensor, cond: Condition) -> Tensor:
        """The student's mean velocity over flow times [rho, tau], at points y [B, C, H, W]."""
        t, r = (time_of_flow(self.schedule, time) for time in (tau, rho))
        return self.velocity_at(self.model, y, tau, cond.with_scalars(**self.told(t, r)))

    def times(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Flow times rho <= tau, float64 [B] each."""
        pair = torch.stack([batch.normal(name, ()).double() for name in ("tau", "rho")])
        pair = torch.sigmoid(self.config.level_mean + self.config.level_std * pair)
        even = torch.stack([batch.uniform(f"uniform {name}") for name in ("t", "r")])
        uniform = batch.uniform("uniform") < self.config.uniform
        pair = torch.where(uniform, flow_time(self.schedule, even), pair)
        pair = pair.clamp(1e-3, self.largest_tau)
        tau, rho = pair.amax(0), pair.amin(0)
        rho = torch.where(batch.uniform("distinct") < self.config.distinct, rho, tau)
        whole = batch.uniform("one step") < self.config.one_step
        # At the very end the derivative in tau would be that of a constant.
        last = (1 - 1e-6) * self.largest_tau
        return torch.where(whole, 0.0, rho), torch.where(whole, last, tau).clamp(max=last)

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
        rho, tau = self.times(batch)
        eps = batch.normal("eps", x_0.shape[1:])
        y = expand_to(1 - tau, x_0) * x_0 + expand_to(tau, x_0) * eps
        t, v = time_of_flow(self.schedule, tau), eps - x_0
        if self.config.source == "teacher":
            # Like the student in the JVP: in bf16 its rounding would hide how the two differ.
            with torch.no_grad(), torch.autocast(x_0.device.type, enabled=False):
                v = velocity(self.teacher(self.noised(x_0, eps, t), t, cond))
        elif self.guided:
            v = self.guided_velocity(v, y, tau, cond, self.dropped(batch))
        return rho, tau, y, v, cond

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        rho, tau, y, v, cond = self.points(batch)
        u, change = with_derivative(
            self.config.derivative,
            lambda y, rho, tau: self.u(y, rho, tau, cond),
            (y, rho, tau),
            (v, torch.zeros_like(rho), torch.ones_like(tau)),
            (y, rho, tau.clamp(max=self.largest_tau - STEP)),
        )
        off = u - (v - expand_to(tau - rho, y) * change)
        t = time_of_flow(self.schedule, tau)
        error = self.conditioned(off, t).square().flatten(1).sum(1)
        weight = (error.detach() + self.config.weight_floor) ** -self.config.power
        return (weight * error).mean(), {"mse": off.detach().square().mean()}
