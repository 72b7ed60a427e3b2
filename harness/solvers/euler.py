"""Euler's method in t on the sampling ODE `dx/dt = alpha'_t x_0 + sigma'_t eps`.

Source: Song et al. 2021, arXiv 2011.13456, eq. 13. Under the flow schedule this is DDIM. Under a
variance-preserving schedule its error is larger than DDIM's.
"""

from __future__ import annotations

from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Model, expand_to
from harness.solvers.base import SOLVERS, Noise, Solver


@SOLVERS.register("euler")
class Euler(Solver):
    """Euler's method in t: first order, one evaluation per step; the last returns x_0."""

    def step(self, model: Model, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition, state: None,
             noise: Noise | None) -> tuple[Tensor, Tensor, None]:  # fmt: skip
        prediction = model(x_t, t, cond)
        if s == 0:
            return prediction.x_0, prediction.x_0, None
        d_alpha, d_sigma = (expand_to(d, x_t) for d in model.schedule.derivatives(t))
        slope = d_alpha * prediction.x_0 + d_sigma * prediction.eps
        return x_t + expand_to(s - t, x_t) * slope, prediction.x_0, None
