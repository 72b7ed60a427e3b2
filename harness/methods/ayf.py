"""AYF, Align Your Flow (Sabour et al. 2025, arXiv 2506.14603): flow maps from a teacher.

The student's u(y, rho, tau) is the mean velocity over flow times [rho, tau]. A jump to rho must not
depend on where the teacher's path is left (AYF-EMD, alg. 1). With the teacher's velocity v_T,

    g = v_T(y, tau) - sg u - r (tau - rho) sg du/dtau,    g <- g / (|g| + c)
    L = |u - sg(u + g)|^2

du/dtau is the derivative along the teacher's path, (v_T, 0, 1) in (y, rho, tau). It is a central
difference unless `derivative` says otherwise. r rises to `ramp_to` in `ramp_steps` steps. A smaller
r pulls towards straight paths (eq. 5), so the paper stops at 0.99.

A jump's length tau - rho is logit-normal, and rho is uniform below 1 - length. The paper's text was
not at hand for this law, which is a choice, nor for its warm-up of 10,000 steps.

Ours: the teacher has the task's guidance. The paper's is guided by a worse network (autoguidance)
at a random scale, which the student is told. The GAN stage and AYF-LMD, which fails on images, are
not here. The shares `uniform` and `one_step` are those of `parts/flow_map.py`.

The loss of an eps network is taken times alpha_t after g is normalised, as sCM's is.

Untrained, from the teacher's weights: the student is the unguided teacher under S-step DDIM. Exact:
with `ramp_to` 1, g is 0 where u is the teacher's own mean velocity.
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
from harness.methods.parts.derivatives import Derivative, TangentConfig
from harness.methods.parts.flow_map import FlowMap, LengthConfig
from harness.methods.parts.options import Span
from harness.methods.parts.student import time_of_flow


class AYFConfig(LengthConfig, TangentConfig):
    lr: float = Field(2e-4, gt=0, le=1)
    """Peak learning rate of AdamW."""
    derivative: Derivative = Field("difference")
    """How the student's derivative is computed: as a central difference, which runs with any
    attention kernel, or exactly, by forward mode. Both take three forwards."""
    ramp_to: float = Field(0.99, ge=0, le=1)
    """Factor r of the derivative after its rise; 1 is the teacher's path without a pull."""


@METHODS.register("ayf")
class AYF(FlowMap):
    """Align Your Flow: jumps between any two times that agree along the teacher's path."""

    Config = AYFConfig
    tunes: ClassVar = {
        "lr": Span(3e-5, 3e-3, log=True),
        "ramp_steps": (100, 300, 600),
        "normalisation": (0.1, 1.0),
        "one_step": (0.02, 0.05, 0.2),
    }
    target = "guided teacher"
    reference: ClassVar = "Sabour et al. 2025, arXiv 2506.14603, alg. 1 and eq. 4 and 5"

    def updates(self, step: int) -> Iterable[Update]:
        r = self.config.ramp_to * self.config.ramp(step)
        return [Update("student", partial(self.loss_at, r=r))]

    def times(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Flow times rho < tau, float64 [B] each."""
        length = self.config.length(batch)
        rho = batch.uniform("rho") * (1 - length)
        return self.spread(batch, torch.stack([rho + length, rho]))

    def loss_at(self, batch: Batch, r: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at factor r of the derivative."""
        assert batch.data is not None
        x_0, cond = batch.data
        rho, tau = self.times(batch)
        t, eps = time_of_flow(self.schedule, tau), batch.normal("eps", x_0.shape[1:])
        y = expand_to(1 - tau, x_0) * x_0 + expand_to(tau, x_0) * eps
        v = self.teachers(x_0, eps, t, cond)
        u, change = self.along(lambda y, rho, tau: self.u(y, rho, tau, cond), y, rho, tau, v)
        g = v - u.detach() - r * expand_to(tau - rho, y) * change
        error = (u - u.detach() - self.config.normalised(g)).square().flatten(1).mean(1)
        return self.conditioned(error, t).mean(), {"tangent": g.square().mean()}
