"""alpha-Flow (arXiv 2510.20771): from flow matching to MeanFlow without a derivative.

The mean velocity u over [r, t] is that of a short part of the jump, then of the rest:

    s = t - alpha (t - r),    x_s = x_t - alpha (t - r) v
    L = w |u(x_t, r, t) - sg(alpha v + (1 - alpha) u(x_s, r, s))|^2

alpha = 1 is flow matching, 1/2 is like a shortcut model, and the limit 0 is MeanFlow. alpha falls
with the step k, `1 - sigmoid(25 (k - middle) / (last - first))`. Below `smallest` it stays there,
so that no derivative is needed (`discrete`), or becomes 0: MeanFlow's own loss (`meanflow.py`).
The weight is `alpha / (|.|^2 + c)`, with a mean over dimensions, and without the factor alpha
where r = t. Targets are cut at `clip`.

Times, guidance and the network's inputs are MeanFlow's; `power` and `derivative` are those of its
loss, at alpha = 0. Ours: alpha falls in steps, not in a part
of the run, and above 1 - `smallest` it counts as 1, which saves a pass.

Untrained, from the teacher's weights: the student is the unguided teacher under S-step DDIM. At the
exact mean velocity, with the exact v, the error falls with the square of alpha.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from harness.diffusion.denoiser import expand_to
from harness.methods.base import METHODS, Batch, Update
from harness.methods.meanflow import MeanFlow, MeanFlowConfig
from harness.methods.parts.options import Span
from harness.methods.parts.student import time_of_flow

STEEPNESS = 25.0
"""Of the sigmoid by which alpha falls (released code)."""


class AlphaFlowConfig(MeanFlowConfig):
    distinct: float = Field(0.5, ge=0, le=1)
    """Share of a batch with r different from t."""
    fall_from: int = Field(0, ge=0, le=10**8)
    """Step from which alpha falls (paper: 600k of 1.2M for XL, 0 for B)."""
    fall_steps: int = Field(600, ge=1, le=10**8)
    """Steps in which alpha falls from 1 to `smallest` (paper: 400k for XL, the whole run for B)."""
    smallest: float = Field(0.005, gt=0, lt=0.5)
    """The smallest alpha above 0."""
    discrete: bool = True
    """Whether alpha stays at `smallest`; otherwise it becomes 0, which needs a derivative."""
    clip: float = Field(4.0, gt=0, le=1e6)
    """Largest absolute value of a target."""
    weight_floor: float = Field(1e-3, gt=0, le=1e3)
    """Constant c of the adaptive weight, for a mean over dimensions."""


@METHODS.register("alpha-flow")
class AlphaFlow(MeanFlow):
    """alpha-Flow: mean velocities from shorter ones; their share alpha falls to MeanFlow's 0."""

    Config = AlphaFlowConfig
    tunes: ClassVar = {
        "lr": Span(1e-5, 1e-2, log=True),
        "distinct": (0.25, 0.5, 0.75),
        "fall_steps": (150, 300, 600, 1200),
        "one_step": (0.02, 0.05, 0.2),
    }
    reference: ClassVar = "arXiv 2510.20771, and its released code"

    def alpha(self, step: int) -> float:
        """The share alpha at a step: 1, then falling, then `smallest` or 0."""
        config: AlphaFlowConfig = self.config
        done = (step - config.fall_from) / config.fall_steps
        alpha = float(torch.sigmoid(torch.tensor(-STEEPNESS * (done - 0.5), dtype=torch.float64)))
        if alpha < config.smallest:
            return config.smallest if config.discrete else 0.0
        return 1.0 if alpha > 1 - config.smallest else alpha

    def updates(self, step: int) -> Iterable[Update]:
        alpha = self.alpha(step)
        if alpha == 0:
            return [Update("student", self.loss, "derivative")]
        phase = "flow" if alpha == 1 else ""
        return [Update("student", partial(self.loss_at, alpha=alpha), phase)]

    def loss_at(self, batch: Batch, alpha: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at alpha > 0."""
        rho, tau, y, v, cond = self.points(batch)
        u, target = self.u(y, rho, tau, cond), v
        if alpha < 1:
            length = tau - rho
            with torch.no_grad():
                there = y - expand_to(alpha * length, y) * v
                rest = self.u(there, rho, tau - alpha * length, cond)
                target = alpha * v + (1 - alpha) * rest
        target = target.clamp(-self.config.clip, self.config.clip)
        off = self.conditioned(u - target, time_of_flow(self.schedule, tau))
        error = off.square().flatten(1).mean(1)
        floored = error.detach() + self.config.weight_floor
        weight = torch.where(rho < tau, alpha, 1.0).to(error) * floored**-self.config.power
        return (weight * error).mean(), {"mse": off.detach().square().mean()}
