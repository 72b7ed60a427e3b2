"""DDIM, deterministic (Song et al. 2021, arXiv 2010.02502, eq. 12 with eta = 0)."""

from __future__ import annotations

from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Model, Prediction, expand_to
from harness.diffusion.schedules import Schedule
from harness.solvers.base import SOLVERS, Noise, Solver


def ddim_step(prediction: Prediction, s: Tensor, schedule: Schedule) -> Tensor:
    """`x_s = alpha_s x_0 + sigma_s eps`; s is 0-d or [B]."""
    alpha, sigma = (expand_to(c, prediction.x_0) for c in schedule.alpha_sigma(s))
    return alpha * prediction.x_0 + sigma * prediction.eps


@SOLVERS.register("ddim")
class DDIM(Solver):
    """DDIM: first order, one evaluation per step."""

    def step(self, model: Model, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition, state: None,
             noise: Noise | None) -> tuple[Tensor, Tensor, None]:  # fmt: skip
        prediction = model(x_t, t, cond)
        return ddim_step(prediction, s, model.schedule), prediction.x_0, None


def implied_x_0(x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """The x_0 with which a DDIM step leads from x_t to x_s; t and s are 0-d or [B].

    `x_0 = (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)`
    (Salimans & Ho 2022, arXiv 2202.00512, eq. 8).
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (schedule.alpha_sigma(level) for level in (t, s))
    ratio = sigma_s / sigma_t
    return (x_s - expand_to(ratio, x_s) * x_t) / expand_to(alpha_s - ratio * alpha_t, x_s)
