"""DPM-Solver++(2M), multistep, data prediction (Lu et al. 2022, arXiv 2211.01095, alg. 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.conditions import Condition
from harness.denoiser import Model, like
from harness.schedules import Schedule
from harness.solvers.base import SOLVERS, Noise, Solver


@dataclass(frozen=True)
class Previous:
    """x_0 of the step before [B, C, H, W], and that step's `h = lambda_s - lambda_t`."""

    x_0: Tensor
    h: Tensor


def half_log_snr(t: Tensor, schedule: Schedule) -> Tensor:
    """`lambda_t = log(alpha_t / sigma_t)`."""
    alpha, sigma = schedule.alpha_sigma(t)
    return torch.log(alpha / sigma)


@SOLVERS.register("dpm-solver++2m")
class DPMSolver2M(Solver):
    """Second order, one evaluation a step: `x_s = (sigma_s / sigma_t) x_t - alpha_s (e^-h - 1) D` with
    `D = (1 + 1 / 2r) x_0 - (1 / 2r) x_0'`, x_0' the prediction before and `r = h' / h`.

    The first step has no x_0', and in a step that starts or ends where lambda is infinite the correction vanishes or is left
    out: those are of first order.
    """

    def step(self, model: Model, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition, state: Previous | None,
             noise: Noise | None) -> tuple[Tensor, Tensor, Previous]:  # fmt: skip
        x_0 = model(x_t, t, cond).x_0
        h = half_log_snr(s, model.schedule) - half_log_snr(t, model.schedule)
        estimate = x_0
        if state is not None and bool(torch.isfinite(h) & torch.isfinite(state.h)):
            estimate = x_0 + like(h / state.h / 2, x_0) * (x_0 - state.x_0)
        (_, sigma_t), (alpha_s, sigma_s) = (model.schedule.alpha_sigma(level) for level in (t, s))
        x_s = like(sigma_s / sigma_t, x_t) * x_t - like(alpha_s * torch.expm1(-h), x_t) * estimate
        return x_s, x_0, Previous(x_0, h)
