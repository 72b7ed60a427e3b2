"""Students that know the jump between any two times: flow maps.

The student's u(y, rho, tau) is the mean velocity over flow times [rho, tau], so a jump is
`y_rho = y - (tau - rho) u`, which in timesteps is DDIM's step. The network is the task's own with
the second time as an input.

The papers' laws of times hardly reach t = 1, where one step starts. So a share `uniform` of a batch
has uniform timesteps, and a share `one_step` starts at t = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Denoiser, Guided
from harness.methods.base import Batch, Problem
from harness.methods.parts.derivatives import STEP, with_derivative
from harness.methods.parts.samplers import Jumps
from harness.methods.parts.student import (
    DataConfig,
    DenoisingStudent,
    TimesConfig,
    flow_time,
    time_of_flow,
    velocity,
)


class FlowMapConfig(TimesConfig):
    """Options of flow maps."""

    one_step: float = Field(0.05, ge=0, le=1)
    """Share of a batch with t = 1 and r = 0, where one-step sampling starts and ends."""
    second_time: Literal["r", "interval"] = "r"
    """What the network is told beside t: r, or t - r."""


class PairConfig(FlowMapConfig, DataConfig):
    """Options of MeanFlow and its descendants: their law of times, and their adaptive weight."""

    distinct: float = Field(0.25, ge=0, le=1)
    """Share of a batch with r different from t."""
    level_mean: float = Field(-0.4, ge=-10, le=10)
    """Mean of the logit of times."""
    level_std: float = Field(1.0, gt=0, le=10)
    """Standard deviation of the logit of times."""
    power: float = Field(1.0, ge=0, le=2)
    """Power p of the adaptive weight; 0 is the plain squared error."""
    weight_floor: float = Field(1e-2, gt=0, le=1e3)
    """Constant c of the adaptive weight (released code: 0.01)."""

    def pair(self, batch: Batch) -> Tensor:
        """Two flow times of a sample, in any order, float64 [2, B]."""
        mean, std = self.level_mean, self.level_std
        return torch.stack([logit_normal(batch, name, mean, std) for name in ("tau", "rho")])

    def weighted(self, off: Tensor) -> Tensor:
        """`|off|^2 / sg(|off|^2 + c)^p` of differences [B, ...], as [B]."""
        error = off.square().flatten(1).sum(1)
        return (error.detach() + self.weight_floor) ** -self.power * error


class LengthConfig(FlowMapConfig):
    """Options of methods that draw a jump's length first."""

    length_mean: float = Field(-0.8, ge=-10, le=10)
    """Mean of the logit of t - r."""
    length_std: float = Field(1.0, gt=0, le=10)
    """Standard deviation of the logit of t - r."""

    def length(self, batch: Batch) -> Tensor:
        """Lengths of jumps in flow time, float64 [B]."""
        return logit_normal(batch, "length", self.length_mean, self.length_std)


def logit_normal(batch: Batch, name: str, mean: float, std: float) -> Tensor:
    """Keyed numbers in (0, 1) whose logit is normal, float64 [B]."""
    return torch.sigmoid(mean + std * batch.normal(name, ()).double())


class FlowMap(DenoisingStudent):
    """A student of jumps between any two times."""

    any_step = True
    scalars: ClassVar[tuple[str, ...]] = ("target",)

    def __init__(
        self,
        config: Any,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
        target_half_life: float | None = None,
    ):
        super().__init__(config, teacher, task, num_steps, total_steps, target_half_life)
        self.solver = Jumps(self.told)

    def told(self, t: Tensor, s: Tensor) -> dict[str, Tensor]:
        """The network's second time, for a jump from t to s."""
        if self.config.second_time == "interval":
            return {"target": 1000 * (flow_time(self.schedule, t) - flow_time(self.schedule, s))}
        return {"target": self.schedule.network_time(s)}

    def u(
        self, y: Tensor, rho: Tensor, tau: Tensor, cond: Condition, model: Denoiser | None = None
    ) -> Tensor:
        """A model's mean velocity over [rho, tau], at points y [B, C, H, W]; the student's own."""
        t, r = (time_of_flow(self.schedule, time) for time in (tau, rho))
        return self.velocity_at(model or self.model, y, tau, cond.with_scalars(**self.told(t, r)))

    def along(
        self,
        function: Callable[[Tensor, Tensor, Tensor], Tensor],
        y: Tensor,
        rho: Tensor,
        tau: Tensor,
        slope: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """A function of (y, rho, tau) and its derivative along (slope, 0, 1): that of a path."""
        return with_derivative(
            self.config.derivative,
            function,
            (y, rho, tau),
            (slope, torch.zeros_like(rho), torch.ones_like(tau)),
            (y, rho, tau.clamp(max=self.largest_tau - STEP)),
        )

    @property
    def last_tau(self) -> float:
        """The largest flow time of training; at the very end a derivative is that of a constant."""
        return (1 - 1e-6) * self.largest_tau

    def spread(
        self, batch: Batch, pair: Tensor, distinct: float = 1.0, ends: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Flow times rho <= tau, float64 [B] each, with the shares `uniform` and `one_step`.

        Args:
            pair: times of the method's law, in any order, [2, B].
            distinct: share of a batch with rho different from tau.
            ends: rho of the samples that start at t = 1, [B]; None is 0.
        """
        even = torch.stack([batch.uniform(f"uniform {name}") for name in ("t", "r")])
        uniform = batch.uniform("uniform") < self.config.uniform
        pair = torch.where(uniform, flow_time(self.schedule, even), pair)
        pair = pair.clamp(1e-3, self.largest_tau)
        tau, rho = pair.amax(0), pair.amin(0)
        rho = torch.where(batch.uniform("distinct") < distinct, rho, tau)
        whole = batch.uniform("one step") < self.config.one_step
        rho = torch.where(whole, torch.zeros_like(rho) if ends is None else ends, rho)
        return rho, torch.where(whole, self.last_tau, tau).clamp(max=self.last_tau)

    @torch.no_grad()
    def teachers(self, x_0: Tensor, eps: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The guided teacher's velocity where x_0 and eps [B, C, H, W] are mixed at t [B]."""
        # Like the student in the JVP: in bf16 its rounding would hide how the two differ.
        with torch.autocast(x_0.device.type, enabled=False):
            return velocity(self.teacher(self.noised(x_0, eps, t), t, cond))
