"""rCM, score-regularised consistency (arXiv 2510.08431, and its released code).

sCM's consistency from the teacher keeps the modes of the data and loses detail. Distribution
matching does the opposite. rCM trains by both. On the circle `x_t = cos(t) x_0 + sin(t) z`
(`parts/circle.py`), with x of standard deviation 1 and the guided teacher's F_T,

    g = -cos(t) sqrt(1 - r^2 sin^2(t)) (F - F_T) - r (cos(t) sin(t) x_t + cos(t) sin(t) dF/dt)
    L = |F - sg(F + g / (|g| + c))|^2 + 2 m L_DMD

g has no gradient, and dF/dt is the derivative along the teacher's path. r rises in
`ramp_steps` steps. With r = 1 this is sCM's tangent. With r < 1 the student is drawn to F_T: it has
cos(t) where sCM has cos^2(t).

L_DMD is DMD2's loss without a GAN (`parts/matching.py`). Its samples come from 1 to 4 simulated
steps, in turn: the first from pure noise, the others at random levels. The last step has gradients.
While r rises there is none, and no fake score trains. Then both networks train, the student in
every `student_every`-th step.

Decided here: the released code does not let the factor of dF/dt rise, the paper does, and so does
this file. Ours: the fake score trains in the student's steps too. m is 1. The paper's is 0.01 on
videos, whose samples have many more numbers: the normalised g of D numbers is about 1 / sqrt(D) in
each, DMD2's gradient about 1. Timesteps of the compared scores are DMD2's, and the fake score's
error is that of its network's output (paper: of x_0, over sin^2(t)). A share `uniform` of a batch
has uniform timesteps. The loss of an eps network is taken times alpha_t, and its samples have the
gradients of a v network, as in sCM and DMD2. The sampler's levels are equally spaced (paper: at
angles of its own).

Untrained, from the teacher's weights: the first step is the unguided teacher's x_0-prediction.
Exact: with r = 1, g is 0 if f is the end of the teacher's ODE. L_DMD has no gradient if the fake
score equals the guided teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from harness.diffusion.denoiser import Guided, expand_to
from harness.methods.base import METHODS, Batch, Problem, Update
from harness.methods.parts.circle import CircleStudent
from harness.methods.parts.derivatives import TangentConfig
from harness.methods.parts.matching import Matching, MatchingConfig
from harness.methods.parts.options import Span
from harness.methods.parts.student import TimesConfig

SIMULATED = 4
"""The most steps of a simulated sample (code: 4)."""


class RCMConfig(TimesConfig, TangentConfig):
    lr: float = Field(2e-4, gt=0, le=1)
    """Peak learning rate of the student (paper: 2e-6)."""
    level_mean: float = Field(0.7, ge=-10, le=10)
    """Mean of log(sigma / alpha) of consistency, for sigma_data 1."""
    level_std: float = Field(1.6, gt=0, le=10)
    """Standard deviation of log(sigma / alpha)."""
    matching: float = Field(1.0, gt=0, le=1e3)
    """Weight m of distribution matching beside consistency."""
    fake_lr: float = Field(1e-3, gt=0, le=1)
    """Peak learning rate of the fake score (paper: 0.2 times the student's)."""
    student_every: int = Field(5, ge=1, le=100)
    """Updates of the fake score for each update of the student, after the rise of r."""


@METHODS.register("rcm")
class RCM(CircleStudent):
    """Score-regularised consistency: sCM's loss from the teacher, and distribution matching."""

    Config = RCMConfig
    tunes: ClassVar = {
        "lr": Span(3e-5, 3e-3, log=True),
        "fake_lr": Span(1e-4, 1e-2, log=True),
        "matching": (0.1, 0.3, 1.0, 3.0),
        "student_every": (1, 2, 5),
        "ramp_steps": (100, 300, 600),
    }
    reference: ClassVar = "Zheng et al. 2025, arXiv 2510.08431, and its released code"

    @staticmethod
    def student_updates(config: Any, total_steps: int) -> int:
        first = min(config.ramp_steps, total_steps)
        return first + math.ceil((total_steps - first) / config.student_every)

    def __init__(
        self,
        config: RCMConfig,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        super().__init__(config, teacher, task, num_steps, total_steps)
        shared = config.model_dump(include={"fake_lr", "weight_decay", "clip", "warmup"})
        options = MatchingConfig(student_gan=0.0, fake_gan=0.0, **shared)
        self.matching = Matching(options, self.teacher, task, self.starts_as_teacher)
        self.players["fake_score"] = self.matching.player

    def updates(self, step: int) -> Iterable[Update]:
        r, after = self.config.ramp(step), step - self.config.ramp_steps
        if after < 0:
            return [Update("student", partial(self.consistency, r=r), "consistency")]
        count, found = after % SIMULATED + 1, []
        if after % self.config.student_every == 0:
            mine = after // self.config.student_every % SIMULATED + 1
            found.append(Update("student", partial(self.loss_at, count=mine), f"{mine} steps"))
        fake = Update("fake_score", partial(self.fake_loss, count=count), f"{count} steps")
        return [*found, fake]

    def consistency(self, batch: Batch, r: float) -> tuple[Tensor, dict[str, Tensor]]:
        """sCM's part of the loss, at warm-up factor r."""
        assert batch.data is not None
        x_0, cond = batch.data
        mean = self.config.level_mean + math.log(self.sd)
        t, angle = self.drawn(batch, mean, self.config.level_std)
        cos, sin = (expand_to(c, x_0) for c in (angle.cos(), angle.sin()))
        x = cos * x_0 + sin * self.sd * batch.normal("eps", x_0.shape[1:])
        slope = self.teachers(x, angle, cond)
        now, change = self.along(x, angle, slope, cond)
        towards = cos * (1 - (r * sin) ** 2).sqrt() * (now.detach() - slope / self.sd)
        g = self.config.normalised(-towards - r * (cos * sin * x / self.sd + change))
        error = (now - now.detach() - g).square().flatten(1).mean(1)
        return self.conditioned(error, t).mean(), {"tangent": g.square().mean()}

    def samples(self, batch: Batch, count: int, name: str) -> Tensor:
        """The student's samples [B, C, H, W] of `count` simulated steps."""
        drawn = [torch.ones(len(batch.index), dtype=torch.float64, device=batch.index.device)]
        drawn += [batch.uniform(f"{name} level {i}") for i in range(1, count)]
        levels = torch.stack(drawn).sort(0, descending=True).values
        assert batch.data is not None
        return self.simulated(self.model, levels, batch.data[1], batch, name)

    def loss_at(self, batch: Batch, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's whole loss, with samples of `count` simulated steps."""
        assert batch.data is not None
        own, metrics = self.consistency(batch, r=1.0)
        x = self.samples(batch, count, "student")
        matching, more = self.matching.student_loss(x, batch.data[1], batch)
        return own + 2 * self.config.matching * matching, metrics | more

    def fake_loss(self, batch: Batch, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The fake score's loss on samples of `count` simulated steps."""
        assert batch.data is not None
        with torch.no_grad():
            x = self.samples(batch, count, "fake")
        return self.matching.fake_loss(x, batch.data[1], batch)
