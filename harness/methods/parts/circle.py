"""Students on TrigFlow's circle (Lu & Song 2024, arXiv 2410.11081, eq. 5).

Data of standard deviation sd are noised to `x_t = cos(t) x_0 + sin(t) z`, z ~ N(0, sd^2), where t
is an angle in (0, pi / 2). There the consistency function is

    f = cos(t) x_t - sin(t) sd F(x_t / sd, t)

F is the task's network: `F = cos(t) eps - sin(t) x_0 / sd` with its eps and x_0 at the same
signal-to-noise ratio. So f is its x_0-prediction, and the velocity dx/dt of a denoiser is sd F.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Denoiser, Guided, expand_to
from harness.methods.base import Batch, Problem
from harness.methods.parts.derivatives import with_derivative
from harness.methods.parts.student import DenoisingStudent, largest_sigma, sigma_ve


class CircleStudent(DenoisingStudent):
    """A student whose loss has the derivative of F along a path on the circle."""

    any_step = True

    def __init__(
        self, config: Any, teacher: Guided | None, task: Problem, num_steps: int, total_steps: int
    ):
        super().__init__(config, teacher, task, num_steps, total_steps)
        self.sd = task.data_std
        self.largest = largest_sigma(self.schedule)

    @classmethod
    def reads_data(cls, config: Any, total_steps: int) -> bool:
        return True

    def F(self, model: Denoiser | Guided, x: Tensor, angle: Tensor, cond: Condition) -> Tensor:
        """F at points x [B, C, H, W] of the circle and angles [B], float32."""
        cos, sin = (expand_to(c, x) for c in (angle.cos(), angle.sin()))
        t = self.schedule.time_of(self.sd * angle.tan())
        alpha, _ = self.schedule.alpha_sigma(t)
        found = model(x * expand_to(alpha / angle.cos(), x), t, cond)
        return cos * found.eps - sin * found.x_0 / self.sd

    def drawn(self, batch: Batch, mean: float, std: float) -> tuple[Tensor, Tensor]:
        """Timesteps t [B] of the share `uniform` and of a log-normal law, and angles [B] there.

        Args:
            mean, std: those of log sigma / alpha.
        """
        sigma = (mean + std * batch.normal("level", ()).double()).exp()
        t = self.with_uniform(batch, self.schedule.time_of(sigma))
        sigma = sigma_ve(self.schedule, t).clamp(1e-3 * self.sd, self.largest)
        return t, torch.atan(sigma / self.sd)

    @torch.no_grad()
    def teachers(self, x: Tensor, angle: Tensor, cond: Condition) -> Tensor:
        """The guided teacher's velocity dx/dt at points x [B, C, H, W] of the circle."""
        # Like the student in the JVP: in bf16 its rounding would hide how the two differ.
        with torch.autocast(x.device.type, enabled=False):
            return self.sd * self.F(self.teacher, x, angle, cond)

    def along(
        self, x: Tensor, angle: Tensor, slope: Tensor, cond: Condition
    ) -> tuple[Tensor, Tensor]:
        """F, and `cos(t) sin(t) dF/dt` along a path of slope dx/dt, at points x [B, C, H, W].

        Gradients flow through F.
        """
        cos, sin = (expand_to(c, x) for c in (angle.cos(), angle.sin()))
        return with_derivative(
            self.config.derivative,
            lambda x, angle: self.F(self.model, x, angle, cond),
            (x, angle),
            (cos * sin * slope, (angle.cos() * angle.sin()).double()),
        )
