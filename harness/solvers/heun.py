"""Heun's method on `d x_hat / d sigma_ve = eps`, `x_hat = x / alpha`, `sigma_ve = sigma / alpha`.

Source: Karras et al. 2022, arXiv 2206.00364, alg. 1 without noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Model, expand_to
from harness.solvers.base import SOLVERS, Noise, Solver
from harness.solvers.ddim import ddim_step


@SOLVERS.register("heun")
class Heun(Solver):
    """Heun's method: second order, two evaluations per step and one in the last, 2 S - 1 in all.

    Where alpha_t = 0 (the flow schedule at t = 1) sigma_ve is infinite. That step is DDIM with one
    evaluation.
    """

    def step(self, model: Model, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition, state: None,
             noise: Noise | None) -> tuple[Tensor, Tensor, None]:  # fmt: skip
        first = model(x_t, t, cond)
        x_s = ddim_step(first, s, model.schedule)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            model.schedule.alpha_sigma(level) for level in (t, s)
        )
        plain = (sigma_s == 0) | (alpha_t == 0)
        if bool(plain.all()):
            return x_s, first.x_0, None
        second = model(x_s, s, cond)
        half_step = (sigma_s - alpha_s * sigma_t / alpha_t.clamp(min=1e-12)) / 2
        correction = expand_to(half_step, x_t) * (second.eps - first.eps)
        return x_s + torch.where(expand_to(plain, x_t) > 0, 0.0, correction), first.x_0, None
