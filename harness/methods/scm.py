"""sCM, continuous-time consistency models (Lu & Song 2024, arXiv 2410.11081).

On the circle `x_t = cos(t) x_0 + sin(t) z`, z ~ N(0, sd^2), the consistency function is
`f = cos(t) x_t - sin(t) sd F(x_t / sd, t)` (eq. 5). The loss is (eq. 7 and 8, alg. 1)

    g = -cos^2(t) (sd F^- - dx/dt) - r cos(t) sin(t) (x_t + sd dF^-/dt),    g <- g / (|g| + c)
    L = e^w(t) / D |F - F^- - g|^2 - w(t)

dF/dt is the derivative along the path, by forward mode. F^- is F without gradients, and w(t) is
learned. r rises from 0 to 1 in `ramp_steps` steps: 10,000 in the paper. In a tenth of a run of a
few hundred steps it rises 100 times too fast, and the run diverges.

The paper's prior weight is 1 / sigma with sigma = sd tan(t). It is in g already: the derivative of
the loss holds sin(t) df/dt, of which 1 / tan(t) leaves the cos(t) of g. Dividing the loss by sigma
again would apply it twice, so `prior_weight` is "none" unless asked for.

An eps network's F has c_out = 1 / cos(t); its loss is taken times alpha_t, after w(t), which would
undo it (`DenoisingStudent.conditioned`). A share `uniform` of a batch has uniform timesteps: the
log-normal law is above t = 0.9 in 4 of 10,000 samples on DiT's schedule.

dx/dt is the guided teacher's (`source: teacher`, sCD) or `cos(t) z - sin(t) x_0` (`source: data`,
sCT). F is made of the task's network (`parts/circle.py`).

Untrained, from the teacher's weights: the first step is the unguided teacher's x_0-prediction.
Exact (sCD): g is 0 if f is the end of the teacher's ODE. In expectation (sCT): there g has mean 0
before normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Guided, expand_to
from harness.methods.base import METHODS, Batch, Problem, Update
from harness.methods.parts.circle import CircleStudent
from harness.methods.parts.derivatives import TangentConfig
from harness.methods.parts.options import Span
from harness.methods.parts.players import Player
from harness.methods.parts.student import DataConfig, TimesConfig
from harness.networks.layers import TimestepEmbedder


class SCMConfig(DataConfig, TimesConfig, TangentConfig):
    lr: float = Field(2e-4, gt=0, le=1)
    """Peak learning rate of AdamW."""
    source: Literal["teacher", "data"] = "teacher"
    """The velocity dx/dt: of the guided teacher (sCD), or of data and noise (sCT)."""
    level_mean: float = Field(-1.0, ge=-10, le=10)
    """Mean of log sigma, for sigma_data 0.5."""
    level_std: float = Field(1.4, gt=0, le=10)
    """Standard deviation of log sigma."""
    prior_weight: Literal["none", "sigma"] = "none"
    """Whether the loss is divided by sigma once more."""
    weight_lr: float = Field(1e-3, gt=0, le=1)
    """Learning rate of w(t)."""


class LearnedWeight(nn.Module):
    """The learned weight w(t) of the loss, 0 at the start."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.embed, self.out = TimestepEmbedder(width), nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, time: Tensor) -> Tensor:
        """Weights [B] at network times [B]."""
        return self.out(self.embed(time)).squeeze(-1).float()


@METHODS.register("scm")
class SCM(CircleStudent):
    """sCM, a continuous-time consistency model: f has derivative 0 along an ODE path."""

    Config = SCMConfig
    tunes: ClassVar = {
        "lr": Span(3e-5, 3e-3, log=True),
        "ramp_steps": (100, 300, 600),
        "normalisation": (0.1, 1.0),
        "uniform": (0.1, 0.3, 0.6),
    }
    reference: ClassVar = "Lu & Song 2024, arXiv 2410.11081, eq. 5 to 8 and alg. 1"

    def __init__(
        self,
        config: SCMConfig,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        super().__init__(config, teacher, task, num_steps, total_steps)
        self.target = "guided teacher" if config.source == "teacher" else "data"
        weight = LearnedWeight()
        optimizer = torch.optim.AdamW(weight.parameters(), config.weight_lr, weight_decay=0.0)
        self.players["weight"] = Player(weight, optimizer, config.clip)

    def updates(self, step: int) -> Iterable[Update]:
        r = self.config.ramp(step)
        return [Update("student", partial(self.loss_at, r=r)), Update("weight", self.weight_loss)]

    def tangent(
        self, x: Tensor, angle: Tensor, slope: Tensor, cond: Condition, r: float
    ) -> tuple[Tensor, Tensor]:
        """F and g before normalisation, for the path's slope dx/dt; gradients flow through F."""
        cos, sin = (expand_to(c, x) for c in (angle.cos(), angle.sin()))
        now, change = self.along(x, angle, slope, cond)
        g = -(cos**2) * (self.sd * now.detach() - slope) - r * (cos * sin * x + self.sd * change)
        return now, g

    def loss_at(self, batch: Batch, r: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's loss at warm-up factor r of the tangent."""
        assert batch.data is not None
        x_0, cond = batch.data
        if self.config.source == "data":
            cond = self.with_dropout(batch, cond)
        mean = self.config.level_mean + math.log(self.sd / 0.5)
        t, angle = self.drawn(batch, mean, self.config.level_std)
        cos, sin = (expand_to(c, x_0) for c in (angle.cos(), angle.sin()))
        z = self.sd * batch.normal("eps", x_0.shape[1:])
        x = cos * x_0 + sin * z
        from_data = self.config.source == "data"
        slope = cos * z - sin * x_0 if from_data else self.teachers(x, angle, cond)
        now, g = self.tangent(x, angle, slope, cond, r)
        g = self.config.normalised(g)
        error = (now - now.detach() - g).square().flatten(1).mean(1)
        if self.config.prior_weight == "sigma":
            error = error / (self.sd * angle.tan()).float()
        time = self.schedule.network_time(self.schedule.time_of(self.sd * angle.tan()))
        batch.carry["weighted"] = time, error.detach()
        with torch.no_grad():
            weight = self.players["weight"].module(time)
        return self.conditioned(weight.exp() * error, t).mean(), {
            "tangent": g.detach().square().mean(),
            "weight": weight.mean(),
        }

    def weight_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`e^w error - w`, with its minimum where e^-w is the mean error."""
        time, error = batch.carry["weighted"]
        weight = self.players["weight"].module(time)
        return (weight.exp() * error - weight).mean(), {}
