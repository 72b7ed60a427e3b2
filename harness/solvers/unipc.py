"""UniPC of order 2: multistep, data prediction, B(h) = e^-h - 1.

Source: Zhao et al. 2023, arXiv 2302.04867, alg. 1 to 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Model, expand_to
from harness.solvers.base import SOLVERS, Noise, Solver
from harness.solvers.dpm_solver import half_log_snr


@dataclass(frozen=True)
class LastStep:
    """The last step.

    Attributes:
        x, t, x_0: its start [B, C, H, W], timestep and prediction.
        before: timestep and prediction of the step before it, if any.
    """

    x: Tensor
    t: Tensor
    x_0: Tensor
    before: tuple[Tensor, Tensor] | None


@SOLVERS.register("unipc")
class UniPC(Solver):
    """UniPC: third order, one evaluation per step, which corrects that step and predicts the next.

    A step with infinite lambda at one end is of first order and is not corrected.
    """

    def step(
        self,
        model: Model,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        cond: Condition,
        state: LastStep | None,
        noise: Noise | None,
    ) -> tuple[Tensor, Tensor, LastStep]:
        x_0 = model(x_t, t, cond).x_0
        if state is not None:
            x_t = unipc_step(model, state.x, state.t, t, state.x_0, state.before, x_0, x_t)
        before = (state.t, state.x_0) if state is not None else None
        x_s = unipc_step(model, x_t, t, s, x_0, before, None, None)
        return x_s, x_0, LastStep(x_t, t, x_0, before)


def unipc_step(
    model: Model,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    x_0: Tensor,
    before: tuple[Tensor, Tensor] | None,
    after: Tensor | None,
    predicted: Tensor | None,
) -> Tensor:
    """One step from x at t to s.

    Args:
        x_0: the prediction at t.
        before: the timestep before t and its prediction, if any.
        after: the prediction at s, for the corrector (UniC); None is the predictor (UniP).
        predicted: the result if the step cannot be corrected.
    """
    lambda_t, lambda_s = (half_log_snr(level, model.schedule) for level in (t, s))
    h = lambda_s - lambda_t
    (_, sigma_t), (alpha_s, sigma_s) = (model.schedule.alpha_sigma(level) for level in (t, s))
    base = expand_to(sigma_s / sigma_t, x) * x - expand_to(alpha_s * torch.expm1(-h), x) * x_0
    if not bool(torch.isfinite(h)):
        return base if predicted is None else predicted
    scale = expand_to(alpha_s * torch.expm1(-h), x)
    r = (half_log_snr(before[0], model.schedule) - lambda_t) / h if before is not None else None
    if before is None or r is None or not bool(torch.isfinite(r)):
        return base if after is None else base - scale * 0.5 * (after - x_0)
    slope = (before[1] - x_0) / expand_to(r, x)
    if after is None:
        return base - scale * 0.5 * slope
    phi = torch.expm1(-h) / -h - 1
    b = torch.stack([phi / torch.expm1(-h), 2 * (phi / -h - 0.5) / torch.expm1(-h)])
    rows = torch.stack([torch.ones_like(b), torch.stack([r, torch.ones_like(r)])])
    weights = torch.linalg.solve(rows, b)
    return base - scale * (
        expand_to(weights[0], x) * slope + expand_to(weights[1], x) * (after - x_0)
    )
