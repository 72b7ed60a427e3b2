"""TVM, terminal velocity matching (Zhou et al. 2025, arXiv 2511.19797): flow maps from data.

A jump from y at flow time tau ends in `f(rho) = y - (tau - rho) u(y, rho, tau)`. As rho moves, the
end moves with the flow's velocity there. The target average says that velocity: it is u where a
jump has no length, and it is learned from data. With `v(y, tau) = u(y, tau, tau)` and `b = 1 / w`,

    L = b^2 |d_rho f - sg v_a(f, rho)|^2 + b^2 |v(y', tau') - sg v_w|^2
    d_rho f = u - (tau - rho) du/drho,    v_w = w (eps - x_0) + (1 - w) v_a(y', tau' | null)

v_a is the average's v (half-life `target_half_life`); y and y' share noise. In du/drho rho alone
moves, and gradients flow through it. w is the task's guidance scale (`guidance`), and 1 for samples
without a label. By a difference the value of u is the mean of its two sides, so the first term
takes two passes.

A jump's length is logit-normal, and so are rho, cut below 1 - length, and tau'.

Ours: w is one number, which the network is not told, and the output is not scaled by it (code: on
at 256 px, off at 512). Changes of the network (RMSNorm in adaLN, QK-norm) are not here. A share
`uniform` has uniform timesteps. A share `one_step` has t = 1 and any rho, not rho = 0: the way of
the end from rho = 1 to 0 makes a step. The terms of an eps network are taken times alpha at tau and
at tau' (`DenoisingStudent.conditioned`).

Untrained, from the teacher's weights: the student is the unguided teacher under S-step DDIM. Exact:
the first term is 0 at the exact mean velocity. In expectation: there the second has no gradient.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Guided, expand_to
from harness.methods.base import METHODS, Batch, Problem
from harness.methods.parts.derivatives import DerivativeConfig, with_derivative
from harness.methods.parts.flow_map import FlowMap, LengthConfig, logit_normal
from harness.methods.parts.options import Span
from harness.methods.parts.student import DataConfig, flow_time, time_of_flow


class TVMConfig(LengthConfig, DataConfig, DerivativeConfig):
    one_step: float = Field(0.05, ge=0, le=1)
    """Share of a batch with t = 1, where one-step sampling starts, and any r."""
    level_mean: float = Field(-0.4, ge=-10, le=10)
    """Mean of the logit of times where a jump ends, and of those of flow matching."""
    level_std: float = Field(1.0, gt=0, le=10)
    """Standard deviation of these logits."""
    guidance: float | None = Field(None, gt=0, le=100)
    """Guidance scale w; none is the task's scale."""
    target_half_life: float = Field(69.0, gt=0, le=1e6)
    """Half-life of the target average in steps (paper: decay 0.99, which is 69)."""


@METHODS.register("tvm")
class TVM(FlowMap):
    """Terminal velocity matching: the end of a jump moves with the flow's velocity there."""

    Config = TVMConfig
    tunes: ClassVar = {
        "lr": Span(1e-5, 1e-2, log=True),
        "target_half_life": Span(10.0, 200.0, log=True),
        "uniform": (0.1, 0.3, 0.6),
        "one_step": (0.02, 0.05, 0.2),
    }
    target = "data"
    reference: ClassVar = "Zhou et al. 2025, arXiv 2511.19797, and its released code"

    def __init__(
        self,
        config: TVMConfig,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        super().__init__(config, teacher, task, num_steps, total_steps, config.target_half_life)
        self.scale = task.guidance_scale if config.guidance is None else config.guidance
        self.target = "data" if self.scale == 1 else "guided data"

    def times(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Flow times rho < tau of a jump, and tau' of flow matching, float64 [B] each."""
        mean, std = self.config.level_mean, self.config.level_std
        length = self.config.length(batch)
        below = torch.special.ndtr((torch.logit(1 - length) - mean) / std)
        rho = torch.sigmoid(mean + std * torch.special.ndtri(batch.uniform("rho") * below))
        pair = torch.stack([rho + length, rho])
        rho, tau = self.spread(batch, pair, ends=batch.uniform("end").clamp(1e-3, 0.99))
        t = time_of_flow(self.schedule, logit_normal(batch, "matched", mean, std))
        matched = flow_time(self.schedule, self.with_uniform(batch, t, "matched uniform"))
        return rho, tau, matched.clamp(1e-3, self.last_tau)

    def end(self, y: Tensor, rho: Tensor, tau: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """The end of the jump from y, and its derivative in rho; gradients flow through both."""
        u, change = with_derivative(
            self.config.derivative,
            lambda rho: self.u(y, rho, tau, cond),
            (rho,),
            (torch.ones_like(rho),),
            through=True,
        )
        length = expand_to(tau - rho, y)
        return y - length * u, u - length * change

    @torch.no_grad()
    def averages(self, y: Tensor, tau: Tensor, cond: Condition) -> Tensor:
        """The target average's instantaneous velocity at points y [B, C, H, W]."""
        with torch.autocast(y.device.type, enabled=False):  # like the student in the JVP
            return self.u(y, tau, tau, cond, self.target_model)

    def guided(self, v: Tensor, y: Tensor, tau: Tensor, cond: Condition, scale: Tensor) -> Tensor:
        """The data's velocities v at points y, guided by a scale for each sample [B]."""
        if self.scale == 1:
            return v
        everywhere = torch.ones_like(tau, dtype=torch.bool)
        null = self.averages(y, tau, cond.replaced(everywhere, self.task.null))
        return null + expand_to(scale, y) * (v - null)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.data is not None
        x_0, cond = batch.data[0], self.with_dropout(batch, batch.data[1])
        rho, tau, matched = self.times(batch)
        eps = batch.normal("eps", x_0.shape[1:])
        y, y_matched = (
            expand_to(1 - time, x_0) * x_0 + expand_to(time, x_0) * eps for time in (tau, matched)
        )
        end, moved = self.end(y, rho, tau, cond)
        terminal = moved - self.averages(end.detach(), rho, cond)
        scale = torch.where(self.dropped(batch), 1.0, self.scale)
        target = self.guided(eps - x_0, y_matched, matched, cond, scale)
        matching = self.u(y_matched, matched, matched, cond) - target
        found = [
            self.conditioned(off, time_of_flow(self.schedule, time)).square().flatten(1).mean(1)
            for off, time in ((terminal, tau), (matching, matched))
        ]
        return ((found[0] + found[1]) / scale.square()).mean(), {
            "terminal": terminal.detach().square().mean(),
            "matching": matching.detach().square().mean(),
        }
