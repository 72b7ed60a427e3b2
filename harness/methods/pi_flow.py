"""pi-Flow (Chen et al. 2025, arXiv 2510.14974): one pass gives a policy that needs no network.

A sample's way from noise to data has S segments of flow time tau. At the upper end of one,
(y_s, tau_s), the student describes the x_0 of all points of the segment. A step of the sampler
follows `dy/dtau = pi(y, tau) = (y - x_0(y, tau)) / tau` by Euler's method, without further passes.
Imitation: the policy learns the guided teacher's velocity at points to which it leads itself,

    y_a = the end of the policy's own way from tau_s to tau_a, without gradients
    L = |pi(y_a, tau_a) - v_T(y_a, tau_a)|^2

at two uniform tau_a of the segment. The student starts a segment from noised data.

- `gm`: x_0 at the segment's start is a mixture of K Gaussians: means m_k and weights softmax a_k
  at each pixel, and one variance `q = (tau_s e^l)^2` for all. At another point of the segment it is
  the mean of the mixture that Bayes' rule gives:

      z = ((1 - tau) / tau)^2 - ((1 - tau_s) / tau_s)^2
      nu = (1 - tau) y / tau^2 - (1 - tau_s) y_s / tau_s^2
      x_0 = sum_k w_k (q nu + m_k) / (q z + 1),
      w = softmax_k(a_k + sum_channels m_k (nu - z m_k / 2) / (q z + 1))

  In training 5 % of the components are left out on the way to y_a (`dropout`).
- `dx`: x_0 is linear between K points, equally spaced in the segment's flow time.

m_k and dx's points are the x_0-predictions of K copies of the teacher's last layer
(`networks/parallel.py`). Further heads give a_k and l, and start at a_k = 0 and `l = log 0.05`, as
in the released code. There the copies' biases differ by noise of 0.05 in v. Here an eps
network's differ by alpha_1 times that, since its error at pure noise moves x_0 by 1 / alpha_1.

Ours: 32 substeps (paper: 128) of grids like PDD's. K is 8 (paper: 32 on ImageNet, 8 for text, dx
10). l is the mean of a head's output, where the code has a small network on the conditioning
vector. The loss's constant factor is left out. An eps network's error is taken times alpha at the
segment's start (`DenoisingStudent.conditioned`). The teacher has the task's guidance at all times,
not in an interval. The data-free variant and the mixing with the teacher's way are not here.

Untrained, from the teacher's weights: the first x_0 is the unguided teacher's (gm: nearly, because
of the noise), and dx is the unguided teacher under S-step DDIM. Exact: L is 0 for gm of one
component on Gaussian data, and for dx where the teacher's x_0 is linear in tau.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Denoiser, Guided, expand_to, on_device, predict
from harness.errors import UsageError
from harness.methods.base import METHODS, Batch, Problem
from harness.methods.parts.options import Span
from harness.methods.parts.student import DenoisingStudent, StudentConfig, time_of_flow
from harness.methods.pdd import flow_grid, shifted
from harness.networks.backbones import Backbone
from harness.networks.parallel import with_all_heads
from harness.solvers import Noise, Solver

STATES, EARLIEST = 2, 1e-3
"""Points of a segment that a sample learns at (paper: 2), and the smallest flow time of one."""
FIRST_STD, SPREAD = 0.05, 0.05
"""Standard deviation of untrained components, and of their velocities' differences (code)."""


class PiFlowConfig(StudentConfig):
    policy: Literal["gm", "dx"] = "gm"
    """The policy: a mixture of Gaussians, or x_0 on a grid of flow times."""
    components: int = Field(8, ge=1, le=1024)
    """Number K of the mixture's components, or of the grid's points."""
    substeps: int = Field(32, ge=1, le=4096)
    """Steps of Euler's method on the whole way; num_steps must divide it (paper: 128)."""
    shift: float = Field(1.0, gt=0, le=100)
    """How much segments and substeps are shifted to noise; 1 is equal ones (ImageNet)."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Share of the mixture's components that are left out on the way to a point of training."""


@dataclass(frozen=True)
class Policy:
    """The x_0 of all points of a segment, in flow coordinates.

    Attributes:
        y, tau: the segment's start, [B, C, H, W], and its flow time, float64, 0-d or [B].
        x_0: of each component or grid point, [K, B, C, H, W].
    """

    y: Tensor
    tau: Tensor
    x_0: Tensor

    def mean(self, y: Tensor, tau: Tensor) -> Tensor:
        """x_0 [B, C, H, W] at a point y of flow time tau."""
        raise NotImplementedError

    def velocity(self, y: Tensor, tau: Tensor) -> Tensor:
        """pi(y, tau), [B, C, H, W]."""
        return (y - self.mean(y, tau)) / expand_to(tau, y)

    def way(self, taus: Sequence[Tensor] | Tensor) -> Tensor:
        """The points [N + 1, B, C, H, W] at falling flow times, the segment's start first."""
        path = [self.y]
        for tau, after in pairwise(taus):
            step = expand_to(after - tau, self.y)
            path.append(path[-1] + step * self.velocity(path[-1], tau))
        return torch.stack(path)


@dataclass(frozen=True)
class Mixture(Policy):
    """gm.

    Attributes:
        logits: a_k, [K, B, 1, H, W].
        log_std: l, [B].
    """

    logits: Tensor
    log_std: Tensor

    def mean(self, y: Tensor, tau: Tensor) -> Tensor:
        start = self.tau
        z = expand_to(((1 - tau) / tau) ** 2 - ((1 - start) / start) ** 2, y)
        now, before = (expand_to((1 - s) / s**2, y) for s in (tau, start))
        nu = now * y - before * self.y
        q = expand_to(start, y) ** 2 * expand_to(2 * self.log_std, y).exp()
        # Differences from the middle component: the squares alone would lose float32's digits.
        middle = self.x_0.mean(0)
        closeness = (self.x_0 - middle) * (nu - z * (self.x_0 + middle) / 2) / (q * z + 1)
        weights = (self.logits + closeness.sum(2, keepdim=True)).softmax(0)
        return (weights * (q * nu + self.x_0)).sum(0) / (q * z + 1)

    def without(self, dropped: Tensor) -> Mixture:
        """The mixture of the components that are not dropped [B, K], or of all if all are."""
        dropped = dropped & ~dropped.all(1, keepdim=True)
        mask = dropped.t().reshape(*self.logits.shape[:2], 1, 1, 1)
        return replace(self, logits=self.logits.masked_fill(mask, -math.inf))


@dataclass(frozen=True)
class Grid(Policy):
    """dx.

    Attributes:
        end: flow time of the first grid point, the segment's end; the last is its start.
    """

    end: Tensor

    def mean(self, y: Tensor, tau: Tensor) -> Tensor:
        count = len(self.x_0)
        place = (tau - self.end) / (self.tau - self.end) * (count - 1)
        nodes = torch.arange(count, device=place.device).unsqueeze(1)
        shares = (1 - (place.reshape(1, -1) - nodes).abs()).clamp(min=0)  # of neighbouring nodes
        shares = on_device(shares, y.device, y.dtype)
        return (shares.reshape(count, -1, 1, 1, 1) * self.x_0).sum(0)


class PolicySteps(Solver):
    """A step is a pass of the student, then Euler's method along its policy.

    Args:
        method: makes the policies and knows the grid of flow times.
    """

    def __init__(self, method: PiFlow):
        self.method = method

    def step(self, model: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition,
             state: None, noise: Noise | None) -> tuple[Tensor, Tensor, None]:  # fmt: skip
        first, last = (int((self.method.grid - level).abs().argmin()) for level in (t, s))
        taus = self.method.taus[first : last + 1]
        policy = self.method.policy(model, x_t, taus[0], taus[-1], cond)
        alpha, sigma = model.schedule.alpha_sigma(s)
        y = policy.way(taus)[-1]
        return expand_to(alpha + sigma, y) * y, policy.mean(policy.y, taus[0]), None


@METHODS.register("pi-flow")
class PiFlow(DenoisingStudent):
    """pi-Flow: one pass gives a policy for a segment, which imitates the teacher on its own way."""

    Config = PiFlowConfig
    tunes: ClassVar = {
        "lr": Span(1e-5, 1e-2, log=True),
        "policy": ("gm", "dx"),
        "components": (4, 8, 16, 32),
        "shift": (1.0, 3.0),
    }
    reference: ClassVar = "Chen et al. 2025, arXiv 2510.14974, and its released code"

    def __init__(
        self,
        config: PiFlowConfig,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        self.schedule = task.schedule
        self.taus = flow_grid(config.substeps, config.shift, self.largest_tau)
        self.grid = time_of_flow(task.schedule, self.taus)
        self.grid[0], self.grid[-1] = 1, 0
        super().__init__(config, teacher, task, num_steps, total_steps)
        self.levels = self.grid[:: config.substeps // num_steps]
        self.solver = PolicySteps(self)

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        if config.substeps % num_steps:
            raise UsageError(
                f"num_steps is {num_steps}, but must divide substeps, which is {config.substeps}"
            )

    def new_network(self, config: Any, task: Problem) -> Backbone:
        network, count = super().new_network(config, task), config.components
        if config.policy == "dx":
            return with_all_heads(network, count, 0, 0.0)
        eps = self.output(config, task) == "eps"
        smallest = float(task.schedule.alpha_sigma(torch.ones(()))[0]) if eps else 1.0
        more = -(-count // task.shape[0]) + 1  # of C channels each: logits, then the deviation
        return with_all_heads(network, count, more, SPREAD * smallest)

    def untrained_sampler(self) -> Any:
        return super().untrained_sampler() if self.config.policy == "dx" else None

    def policy(
        self, model: Denoiser, x_t: Tensor, tau: Tensor, end: Tensor, cond: Condition
    ) -> Policy:
        """The policy of a segment of flow time from tau to `end`, 0-d or [B], from x_t there."""
        t, kind = time_of_flow(self.schedule, tau), model.prediction_type
        time = on_device(self.schedule.network_time(t), x_t.device).expand(len(x_t))
        outputs = model.network(x_t, time, cond)[:, : x_t.shape[1]].unflatten(0, (-1, len(x_t)))
        count = self.config.components
        x_0 = torch.stack([predict(o, x_t, t, self.schedule, kind).x_0 for o in outputs[:count]])
        alpha, sigma = self.schedule.alpha_sigma(t)
        y = x_t / expand_to(alpha + sigma, x_t)
        if self.config.policy == "dx":
            return Grid(y, tau, x_0, end)
        more = outputs[count:].to(x_0.dtype)
        logits = more[:-1].movedim(2, 1).flatten(0, 1)[:count].unsqueeze(2)
        return Mixture(y, tau, x_0, logits, math.log(FIRST_STD) + more[-1].mean((1, 2, 3)))

    def points(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Flow times of the substeps of each sample's segment, and of the points it learns at.

        Float64, falling [N + 1, B] and [STATES, B].
        """
        segments = len(self.levels) - 1
        length, device = self.config.substeps // segments, batch.index.device
        place = (batch.uniform("segment") * segments).long()
        nodes = torch.arange(length + 1, device=device).unsqueeze(1) + place * length
        drawn = torch.stack([batch.uniform(f"state {i}") for i in range(STATES)])
        at = self.largest_tau * shifted(1 - (place + drawn) / segments, self.config.shift)
        return self.taus.to(device)[nodes], at.clamp(min=EARLIEST)

    def states(self, policy: Policy, taus: Tensor, at: Tensor, batch: Batch) -> Tensor:
        """The points [STATES, B, C, H, W] to which a policy leads at flow times `at`."""
        if isinstance(policy, Mixture) and self.config.dropout:
            drawn = batch.uniform("component", (self.config.components,))
            policy = policy.without(drawn < self.config.dropout)
        stops = torch.cat([taus, at]).sort(0, descending=True).values
        place = (stops > at.unsqueeze(1)).sum(1)
        return policy.way(stops)[place, torch.arange(at.shape[1], device=at.device)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.data is not None
        x_0, cond = batch.data
        taus, at = self.points(batch)
        t = time_of_flow(self.schedule, taus[0])
        x_t = self.noised(x_0, batch.normal("eps", x_0.shape[1:]), t)
        policy = self.policy(self.model, x_t, taus[0], taus[-1], cond)
        teacher: Denoiser = self.teacher  # type: ignore[assignment]
        with torch.no_grad():
            y = self.states(policy, taus, at, batch)
            targets = [self.velocity_at(teacher, *point, cond) for point in zip(y, at, strict=True)]
        found = [policy.velocity(*point) for point in zip(y, at, strict=True)]
        off = torch.stack([self.conditioned(v - u, t) for v, u in zip(found, targets, strict=True)])
        return off.square().mean(), {"mse": off.detach().square().mean()}
