"""TwinFlow with RCGM (Cheng et al. 2025, arXiv 2512.05150, and its released code).

One network F(y, t, t') of flow times is the mean velocity from t to t' <= t. A second branch F~ of
the same network is the velocity of the student's own one-step samples. There is no teacher, critic,
derivative or GAN. Of each four samples

- one has t = 1 and t' = 0, one has t' in [0.95 t, t], and one has t' in [0, t]; t is uniform.
  They learn by recursive consistency (RCGM), with v = eps - x_0 and a slow average F^-:

      x' = y - h v,    D = the way of F^- from x' at t - h to t' in N equal jumps
      g = ((t - t') F - D) / h - v,    target sg(F - clamp(g, -1, 1))

  If t - t' < h, D is 0 and g = F - v.
- one is a one-step sample x~, noised to a uniform t. F~ learns its velocity eps - x~.

The first kind is rectified too. Its jump's end x^ is noised to x_s at a uniform time s:

    target sg(F - clamp(F~(x_s, s) - F(x_s, s, s), -1, 1)),    with the weight `rectify`

It moves samples towards data where the two velocities differ, as distribution matching does. The
loss of a difference with mean square m is `m / (c sqrt(m / c^2 + 1))`, about its root. The weight
of RCGM is `1 + tan((1 - t + t') pi / 2.5)`.

Guidance as in the released code: `v + r (F^-(y, t, t | c) - F^-(y, t, t | null))`. At the fixed
point the scale is 1 / (1 - r); by default it is the task's. Samples without their label have none.

Decided here: F~ is an input of the network (`fake`) that starts at zero, so that both branches
start as the teacher. The paper has negative times, which the teacher's embedding never saw. The
released code takes RCGM's target for the second kind too, and so does this file; x~ and F~ learn
from the network in training, without its average. Ours: all is in float32, since 1 / h would
enlarge bf16's rounding. An eps network's errors are taken times alpha_t
(`DenoisingStudent.conditioned`).

Samplers: a jump to 0 and fresh noise (`renoise`), or jumps from level to level (`jumps`).

Untrained, from the teacher's weights: the student is the unguided teacher under S-step DDIM (one
step for `renoise`). Exact: at the exact mean velocity, with the exact v, g falls with h. The
rectification is 0 where both branches agree. In expectation: the gradient of F~ is 0 at the
velocity of the student's samples.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Denoiser, Guided, expand_to
from harness.methods.base import METHODS, Batch, Problem
from harness.methods.parts.options import Span
from harness.methods.parts.samplers import ConsistencySteps, Jumps
from harness.methods.parts.student import DataConfig, DenoisingStudent, time_of_flow

KINDS = 4
"""Kinds of samples: jumps from noise to data, short jumps, any jumps, and the student's own."""
SHORT, EARLIEST = 0.05, 1e-3
"""Longest short jump, as a share of t, and the smallest t."""
FLOOR, FAKE = 1e-3, 1000.0
"""Constant c of the loss (code), and the input `fake` of the second branch."""


class TwinFlowConfig(DataConfig):
    rectify: float = Field(0.5, ge=0, le=1e3)
    """Weight of the rectification (code: 0.5)."""
    h: float = Field(0.01, gt=0, lt=0.5)
    """Flow time of RCGM's step along v."""
    jumps: int = Field(2, ge=1, le=64)
    """Number N of RCGM's jumps after it."""
    target_half_life: float = Field(69.0, gt=0, le=1e6)
    """Half-life of the slow average in steps (code: decay 0.99)."""
    guidance: float | None = Field(None, ge=0, lt=1)
    """Weight r of guidance; none is 1 - 1 / w for the task's scale w (code: 0.5 and 0.8)."""
    sampler: Literal["renoise", "jumps"] = "renoise"
    """The sampler of several steps."""

    @property
    def sample_group(self) -> int:
        return KINDS


def rows(batch_size: int, first: int, last: int, device: torch.device) -> Tensor:
    """Places of the samples of kinds first .. last - 1 in a batch, int64."""
    groups = torch.arange(0, batch_size, KINDS, device=device).unsqueeze(1)
    return (groups + torch.arange(first, last, device=device)).flatten()


def root_loss(off: Tensor) -> Tensor:
    """The loss [B] of differences [B, C, H, W]."""
    mse = off.square().flatten(1).mean(1)
    return mse / (FLOOR * (mse.detach() / FLOOR**2 + 1).sqrt())


@METHODS.register("twinflow")
class TwinFlow(DenoisingStudent):
    """TwinFlow: recursive consistency from data, rectified by a twin flow of its own samples."""

    Config = TwinFlowConfig
    tunes: ClassVar = {
        "lr": Span(1e-5, 1e-2, log=True),
        "rectify": (0.0, 0.25, 0.5, 1.0),
        "target_half_life": Span(3.0, 150.0, log=True),
        "sampler": ("renoise", "jumps"),
    }
    any_step = True
    target = "data"
    scalars = ("target", "fake")
    reference: ClassVar = "Cheng et al. 2025, arXiv 2512.05150, and its released code"

    def __init__(
        self,
        config: TwinFlowConfig,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        super().__init__(config, teacher, task, num_steps, total_steps, config.target_half_life)
        self.r = 1 - 1 / task.guidance_scale if config.guidance is None else config.guidance
        self.target = "guided data" if self.r else "data"
        end = task.schedule.network_time(torch.zeros((), dtype=torch.float64))
        if config.sampler == "renoise":
            self.solver = ConsistencySteps(target=float(end), fake=0.0)
        else:
            self.solver = Jumps(lambda t, s: self.told(s, torch.zeros_like(s)))

    def told(self, s: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """The network's further inputs, for a jump to timestep s; fake is 0 or 1."""
        return {"target": self.schedule.network_time(s), "fake": FAKE * fake}

    def F(
        self,
        model: Denoiser,
        y: Tensor,
        tau: Tensor,
        rho: Tensor,
        cond: Condition,
        fake: Tensor | None = None,
    ) -> Tensor:
        """F from flow times tau to rho [B] at points y [B, C, H, W], or F~ where fake [B] is 1."""
        fake = torch.zeros_like(tau) if fake is None else fake
        told = self.told(time_of_flow(self.schedule, rho), fake)
        return self.velocity_at(model, y, tau, cond.with_scalars(**told))

    @property
    def last(self) -> float:
        """The flow time of pure noise, where a velocity still has a meaning."""
        return (1 - 1e-6) * self.largest_tau

    def times(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Flow times t and t' of all samples, float64 [B] each."""
        kind = torch.arange(len(batch.index), device=batch.index.device) % KINDS
        tau = (batch.uniform("t") * self.last).clamp(min=EARLIEST)
        length = tau * batch.uniform("length")
        length = torch.where(kind == 1, SHORT * length, torch.where(kind == 3, 0.0, length))
        return torch.where(kind == 0, self.last, tau), torch.where(kind == 0, 0.0, tau - length)

    @torch.no_grad()
    def guided(self, v: Tensor, y: Tensor, tau: Tensor, cond: Condition, batch: Batch) -> Tensor:
        """The data's velocities v at points y of the first three kinds, guided where labelled."""
        if not self.r:
            return v
        everywhere = torch.ones_like(tau, dtype=torch.bool)
        with_label = self.F(self.target_model, y, tau, tau, cond)
        null = cond.replaced(everywhere, self.task.null)
        more = self.r * (with_label - self.F(self.target_model, y, tau, tau, null))
        size, device = len(batch.index), y.device
        dropped = self.dropped(batch)[rows(size, 0, 3, device)]
        return v + torch.where(dropped.reshape(-1, 1, 1, 1), 0.0, more)

    @torch.no_grad()
    def error(
        self, F: Tensor, v: Tensor, y: Tensor, tau: Tensor, rho: Tensor, cond: Condition
    ) -> Tensor:
        """RCGM's g at points y with velocities v, not yet cut, [B, C, H, W]."""
        h, count = self.config.h, self.config.jumps
        start = torch.maximum(tau - h, rho)
        x, way = y - h * v, torch.zeros_like(y)
        for i in range(count):
            now, then = (start + (rho - start) * (j / count) for j in (i, i + 1))
            length = expand_to(now - then, y)
            jump = length * self.F(self.target_model, x, now, then, cond)
            x, way = x - jump, way + jump
        far = tau - rho >= h
        ratio = torch.where(far, (tau - rho) / h, 1.0)
        rest = torch.where(far.reshape(-1, 1, 1, 1), way / h, 0.0)
        return expand_to(ratio, y) * F - rest - v

    @torch.no_grad()
    def rectification(self, x: Tensor, cond: Condition, batch: Batch) -> Tensor:
        """`F~ - F` at samples x [B / 4, C, H, W] that are noised, not yet cut."""
        mine = rows(len(batch.index), 0, 1, x.device)
        eps = batch.normal("rectified eps", x.shape[1:])[mine]
        s = (batch.uniform("rectified t")[mine] * self.last).clamp(min=EARLIEST)
        x_s = expand_to(1 - s, x) * x + expand_to(s, x) * eps
        found = [self.F(self.model, x_s, s, s, cond, b * torch.ones_like(s)) for b in (1, 0)]
        return found[0] - found[1]

    @torch.no_grad()
    def samples(self, cond: Condition, batch: Batch) -> Tensor:
        """The student's one-step samples for the fourth kind, [B / 4, C, H, W]."""
        mine = rows(len(batch.index), 3, 4, batch.index.device)
        noise = batch.normal("x_T", self.task.shape)[mine]
        one = torch.ones(len(mine), dtype=torch.float64, device=noise.device)
        alpha, sigma = self.schedule.alpha_sigma(one)
        y, tau = noise / expand_to(alpha + sigma, noise), self.last * one
        return y - self.last * self.F(self.model, y, tau, 0 * tau, cond)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.data is not None
        device = batch.data[0].device
        # In bf16 rounding, enlarged by 1 / h, would hide what is learnt.
        with torch.autocast(device.type, enabled=False):
            return self.exact_loss(batch, batch.data[0], self.with_dropout(batch, batch.data[1]))

    def exact_loss(
        self, batch: Batch, x_0: Tensor, cond: Condition
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss in full precision."""
        size, device = len(x_0), x_0.device
        whole, real, own = (rows(size, *ends, device) for ends in ((0, 1), (0, 3), (3, 4)))
        tau, rho = self.times(batch)
        eps, x = batch.normal("eps", x_0.shape[1:]), x_0.clone()
        x[own] = self.samples(cond[own], batch).to(x)
        y, v = expand_to(1 - tau, x) * x + expand_to(tau, x) * eps, eps - x
        fake = (torch.arange(size, device=device) % KINDS == KINDS - 1).double()
        F = self.F(self.model, y, tau, rho, cond, fake)
        now, there = F.detach(), (y[real], tau[real], rho[real], cond[real])
        v[real] = self.guided(v[real], y[real], tau[real], cond[real], batch).to(v)
        g = self.error(now[real], v[real], *there).clamp(-1, 1)
        target = v.index_copy(0, real, (now[real] - g).to(v))
        t = time_of_flow(self.schedule, tau)
        weight = 1 + torch.tan((1 - tau + rho) * math.pi / 2.5)
        weight = torch.where(fake > 0, 1.0, weight).to(F)
        loss = (weight * root_loss(self.conditioned(F - target, t))).mean()
        end = y[whole] - expand_to(tau[whole], y) * now[whole]
        d = self.rectification(end, cond[whole], batch).clamp(-1, 1)
        twin = root_loss(self.conditioned(F[whole] - now[whole] + d, t[whole])).mean()
        metrics = {"rcgm": g, "twin": d, "fake": (now - target)[own]}
        return loss + self.config.rectify * twin, {
            name: off.square().mean() for name, off in metrics.items()
        }
