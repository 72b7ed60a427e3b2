"""iMF, improved MeanFlow (Geng et al. 2025, arXiv 2512.02012): MeanFlow as a loss of velocities.

With u(y, rho, tau) the mean velocity over flow times [rho, tau], MeanFlow's identity is turned
around. u and its derivative give a velocity V, which learns the flow's as flow matching does:

    V = u + (tau - rho) sg du/dtau
    L = a(V - v_g) + a(v - v_g),    a(x) = |x|^2 / sg(|x|^2 + c)^p

du/dtau is the derivative along (v(y, tau), 0, 1) in (y, rho, tau). Its v is the network's own
instantaneous velocity, not that of one sample. So V depends on nothing but y, and no noise of data
enters u's target through the derivative. v is a second output of the network (`velocity: head`), or
u(y, tau, tau), without the second loss (`boundary`). The paper has both.

The network is told a guidance scale w, as 1 - 1/w. It learns all scales from 1 to `guidance_to`,
log-uniform, and is sampled at the task's. v's fixed point is guided by w:

    v_g = sg(eps - x_0 + (1 - 1/w) (v(y, tau | c, w) - v(y, tau | null, 1)))

Samples without a label have w = 1.

Ours: the second output is a copy of the last linear layer (code: of 8 blocks and that layer). The
network is told t and r, or t and t - r (code: t - r alone), and guidance holds at all times (code:
in a random interval, which is an input too). Labels are dropped before v is asked for, so du/dtau
follows the sample's own path (code: the path of its label). Times, the shares `uniform` and
`one_step`, and the loss of an eps network are those of MeanFlow (`parts/flow_map.py`).

Untrained, from the teacher's weights: the student is the unguided teacher under S-step DDIM. Exact:
at the exact u and v, V is the flow's velocity E[eps - x_0 | y] for every rho.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Guided, expand_to
from harness.errors import UsageError
from harness.methods.base import METHODS, Batch, Problem
from harness.methods.parts.derivatives import DerivativeConfig
from harness.methods.parts.flow_map import FlowMap, PairConfig
from harness.methods.parts.heads import block_velocities
from harness.methods.parts.options import Span
from harness.methods.parts.samplers import Jumps
from harness.methods.parts.student import time_of_flow
from harness.networks.backbones import Backbone
from harness.networks.parallel import with_parallel_heads

MEAN, INSTANTANEOUS = 0, 1
"""The heads of u and of v."""


class IMFConfig(PairConfig, DerivativeConfig):
    distinct: float = Field(0.5, ge=0, le=1)
    """Share of a batch with r different from t."""
    velocity: Literal["head", "boundary"] = "head"
    """The instantaneous velocity: a head of its own, or the mean velocity at r = t."""
    guidance_to: float | None = Field(None, ge=1, le=100)
    """Largest guidance scale in training (paper: 8); none is twice the task's scale less 1."""


@METHODS.register("imf")
class IMF(FlowMap):
    """Improved MeanFlow: a velocity made of the mean velocity, and learned as in flow matching."""

    Config = IMFConfig
    tunes: ClassVar = {
        "lr": Span(1e-5, 1e-2, log=True),
        "distinct": (0.25, 0.5, 0.75),
        "velocity": ("head", "boundary"),
        "one_step": (0.02, 0.05, 0.2),
    }
    target = "data"
    scalars = ("target", "guidance")
    reference: ClassVar = "Geng et al. 2025, arXiv 2512.02012, and its released code"

    def __init__(
        self,
        config: IMFConfig,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        super().__init__(config, teacher, task, num_steps, total_steps)
        self.largest = self.largest_scale(config, task)
        self.target = "data" if task.guidance_scale == 1 else "guided data"
        fixed = {
            "guidance": torch.tensor(1000 * (1 - 1 / task.guidance_scale)),
            "first": torch.tensor(float(MEAN)),
            "last": torch.tensor(float(MEAN + 1)),
        }
        self.solver = Jumps(lambda t, s: {**fixed, **self.told(t, s)})

    @staticmethod
    def largest_scale(config: Any, task: Problem) -> float:
        """The largest guidance scale in training."""
        given = config.guidance_to
        return 2 * task.guidance_scale - 1 if given is None else given

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        largest, scale = cls.largest_scale(config, task), task.guidance_scale
        if not 1 <= scale <= largest:
            raise UsageError(
                f"guidance_to is {largest:g}, but the task's scale is {scale:g}: "
                "the scales from 1 to guidance_to must contain it"
            )

    def new_network(self, config: Any, task: Problem) -> Backbone:
        network = super().new_network(config, task)
        return with_parallel_heads(network, torch.ones(2)) if config.velocity == "head" else network

    def velocities(
        self, y: Tensor, rho: Tensor, tau: Tensor, cond: Condition, *heads: int
    ) -> Tensor:
        """The heads' velocities at points y [B, C, H, W], [heads, B, C, H, W], by one pass."""
        t, r = (time_of_flow(self.schedule, time) for time in (tau, rho))
        alpha, sigma = self.schedule.alpha_sigma(t)
        first = torch.tensor(heads, device=y.device).unsqueeze(1).expand(-1, len(y))
        cond = cond.with_scalars(**self.told(t, r))
        return block_velocities(
            self.model, y * expand_to(alpha + sigma, y), t, cond, first, first + 1
        )

    def v(self, y: Tensor, tau: Tensor, cond: Condition) -> Tensor:
        """The student's instantaneous velocity."""
        if self.config.velocity == "boundary":
            return self.u(y, tau, tau, cond)
        return self.velocities(y, tau, tau, cond, INSTANTANEOUS)[0]

    def outputs(self, y: Tensor, rho: Tensor, tau: Tensor, cond: Condition) -> Tensor:
        """u, and v if it has a head: [1 or 2, B, C, H, W]."""
        if self.config.velocity == "boundary":
            return self.u(y, rho, tau, cond).unsqueeze(0)
        return self.velocities(y, rho, tau, cond, MEAN, INSTANTANEOUS)

    def compound(
        self, y: Tensor, rho: Tensor, tau: Tensor, slope: Tensor, cond: Condition
    ) -> list[Tensor]:
        """V, and v if it has a head, where the student's path has this slope."""
        found, change = self.along(
            lambda y, rho, tau: self.outputs(y, rho, tau, cond), y, rho, tau, slope
        )
        return [found[0] + expand_to(tau - rho, y) * change[0], *found[1:]]

    def with_scales(self, batch: Batch, cond: Condition, dropped: Tensor) -> Condition:
        """The conditions with a guidance scale for each sample; 1 where the label is dropped."""
        scale = torch.where(dropped, 1.0, self.largest ** batch.uniform("guidance"))
        return cond.with_scalars(guidance=1000 * (1 - 1 / scale))

    @torch.no_grad()
    def guided_velocity(
        self, v: Tensor, y: Tensor, tau: Tensor, cond: Condition
    ) -> tuple[Tensor, Tensor]:
        """The guided velocities of data, and the student's own ones, at points y."""
        with torch.autocast(y.device.type, enabled=False):  # like the student in the JVP
            own = self.v(y, tau, cond)
            if self.largest == 1:
                return v, own
            share = cond.scalars["guidance"] / 1000
            everywhere = torch.ones_like(tau, dtype=torch.bool)
            null = cond.replaced(everywhere, self.task.null).with_scalars(guidance=0 * share)
            return v + expand_to(share, y) * (own - self.v(y, tau, null)), own

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.data is not None
        x_0, cond = batch.data[0], self.with_dropout(batch, batch.data[1])
        cond = self.with_scales(batch, cond, self.dropped(batch))
        rho, tau = self.spread(batch, self.config.pair(batch), self.config.distinct)
        t, eps = time_of_flow(self.schedule, tau), batch.normal("eps", x_0.shape[1:])
        y = expand_to(1 - tau, x_0) * x_0 + expand_to(tau, x_0) * eps
        target, own = self.guided_velocity(eps - x_0, y, tau, cond)
        offs = [found - target for found in self.compound(y, rho, tau, own, cond)]
        losses = [self.config.weighted(self.conditioned(off, t)).mean() for off in offs]
        names = ("mse", "mse_v")
        return torch.stack(losses).sum(), {
            name: off.detach().square().mean() for name, off in zip(names, offs, strict=False)
        }
