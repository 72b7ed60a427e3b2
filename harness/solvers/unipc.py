"""UniPC of order 2, multistep, data prediction, B(h) = e^-h - 1 (Zhao et al. 2023, arXiv 2302.04867, alg. 1 to 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Model, like
from harness.solvers.base import SOLVERS, Noise, Solver
from harness.solvers.dpm_solver import half_log_snr


@dataclass(frozen=True)
class Taken:
    """The step that led here: where it started [B, C, H, W], its timestep, its x_0, and the x_0 of the step before, if any."""

    x: Tensor
    t: Tensor
    x_0: Tensor
    before: tuple[Tensor, Tensor] | None


@SOLVERS.register("unipc")
class UniPC(Solver):
    """UniPC: third order, one evaluation per step, which corrects that step and predicts the next.

    A step that starts or ends where lambda is infinite is of first order and is not corrected.
    """

    def step(self, model: Model, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition, state: Taken | None,
             noise: Noise | None) -> tuple[Tensor, Tensor, Taken]:  # fmt: skip
        x_0 = model(x_t, t, cond).x_0
        if state is not None:
            x_t = moved(model, state.x, state.t, t, state.x_0, state.before, x_0, x_t)
        before = (state.t, state.x_0) if state is not None else None
        x_s = moved(model, x_t, t, s, x_0, before, None, None)
        return x_s, x_0, Taken(x_t, t, x_0, before)


def moved(model: Model, x: Tensor, t: Tensor, s: Tensor, x_0: Tensor, before: tuple[Tensor, Tensor] | None, after: Tensor | None,
          predicted: Tensor | None) -> Tensor:  # fmt: skip
    """From x at t to s.

    Args:
        x_0: the prediction at t.
        before: the timestep before t and the prediction there.
        after: the prediction at s, with which the step is corrected (UniC); None predicts (UniP).
        predicted: what stays where the step cannot be corrected.
    """
    lambda_t, lambda_s = (half_log_snr(level, model.schedule) for level in (t, s))
    h = lambda_s - lambda_t
    (_, sigma_t), (alpha_s, sigma_s) = (model.schedule.alpha_sigma(level) for level in (t, s))
    base = like(sigma_s / sigma_t, x) * x - like(alpha_s * torch.expm1(-h), x) * x_0
    if not bool(torch.isfinite(h)):
        return base if predicted is None else predicted
    scale = like(alpha_s * torch.expm1(-h), x)
    r = (half_log_snr(before[0], model.schedule) - lambda_t) / h if before is not None else None
    if before is None or r is None or not bool(torch.isfinite(r)):
        return base if after is None else base - scale * 0.5 * (after - x_0)
    slope = (before[1] - x_0) / like(r, x)
    if after is None:
        return base - scale * 0.5 * slope
    phi = torch.expm1(-h) / -h - 1
    b = torch.stack([phi / torch.expm1(-h), 2 * (phi / -h - 0.5) / torch.expm1(-h)])
    weights = torch.linalg.solve(torch.stack([torch.ones(2, dtype=b.dtype, device=b.device), torch.stack([r, torch.ones_like(r)])]), b)
    return base - scale * (like(weights[0], x) * slope + like(weights[1], x) * (after - x_0))
