"""Consistency training without a teacher: CT, iCT and ECT.

A consistency function f maps every point of a path to its end. One x_0 and one eps give two points
at neighbouring noise levels sigma_t > sigma_s (sigma / alpha throughout this file). f at the
noisier point learns the value at the other:

    L = w d(f(x_t, t), sg f^-(x_s, s)),    f(x_0, 0) = x_0

- CT (Song et al. 2023, arXiv 2303.01469, alg. 3): f^- is a slow average. The number of Karras'
  levels grows from 2 to 150.
- iCT (Song & Dhariwal 2023, arXiv 2310.14189): f^- is f; d is pseudo-Huber,
  `w = 1 / (sigma_t - sigma_s)`. Levels are log-normal, and their number doubles from 10 to 1,280.
- ECT (Geng et al. 2024, arXiv 2406.14548): no grid,
  `r = t (1 - q^-(stage + 1) (1 + 8 sigmoid(-t)))`, `w = 1 / (t - r)`. It starts with r near 0,
  which is denoising, and closes the gap in stages.

f is the network's x_0-prediction, as in `consistency.py`. CT's unit weight suits the paper's
bounded c_out; an eps network takes its differences times alpha_t instead. iCT's and ECT's weights
fall like 1 / sigma. As in the papers the gradient is therefore small at high noise. A share
`uniform` of iCT's and ECT's batches has uniform timesteps: on DiT's schedule their log-normal
levels are above t = 0.95 in 3 of 1,000 samples, and one-step sampling starts at t = 1. The growth
of the number of levels is counted in steps, not in parts of a run.

All learn the distribution of the data without guidance. The papers' CT and iCT start from random
weights. Constants in sigma are the papers' for sigma_data 0.5, scaled to the task's.

Untrained, from the teacher's weights: the first step is the unguided teacher's x_0-prediction.
In expectation: the gradient is 0 at f(x_t) = E[f(x_s) | x_t], solved from clean data upwards (for
the mean square, and for pseudo-Huber with symmetric residuals).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.diffusion.denoiser import Guided
from harness.errors import UsageError
from harness.methods.base import METHODS, Batch, Problem, Update
from harness.methods.consistency import karras_levels
from harness.methods.parts.options import Span
from harness.methods.parts.student import (
    DataConfig,
    DenoisingStudent,
    HuberConfig,
    TimesConfig,
    largest_sigma,
    sigma_ve,
)

SMALLEST_GAP = 1e-6
"""Smallest relative gap of two noise levels that float32 resolves."""

Pair = tuple[Tensor, Tensor]
"""Timesteps t and s < t, float64 [B] each."""


class ConsistencyTraining(DenoisingStudent):
    """The common base; subclasses set the pairs of levels and their weight."""

    target = "data"
    any_step = True

    @classmethod
    def reads_data(cls, config: Any, total_steps: int) -> bool:
        return True

    def pairs(self, batch: Batch, step: int) -> Pair:
        """The pairs of levels of a batch at a step of the run."""
        raise NotImplementedError

    def weight(self, sigma_t: Tensor, sigma_s: Tensor) -> Tensor:
        """The weight of the loss at two noise levels, float64 [B]."""
        return 1 / (sigma_t - sigma_s)

    def updates(self, step: int) -> Iterable[Update]:
        return [Update("student", partial(self.loss_at, step=step))]

    def loss_at(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at a step of the run."""
        assert batch.data is not None
        x_0, cond = batch.data[0], self.with_dropout(batch, batch.data[1])
        t, s = self.pairs(batch, step)
        eps = batch.normal("eps", x_0.shape[1:])
        with torch.no_grad():
            target = self.target_model(self.noised(x_0, eps, s), s, cond).x_0
            target = torch.where((s == 0).reshape(-1, 1, 1, 1), x_0, target)
        off = self.model(self.noised(x_0, eps, t), t, cond).x_0 - target
        distance = self.config.distance(self.evened(off, t))
        weight = self.weight(
            *(
                sigma_ve(self.schedule, level).clamp(max=largest_sigma(self.schedule))
                for level in (t, s)
            )
        ).float()
        return (weight * distance).mean(), {"mse": off.detach().square().mean()}

    def evened(self, off: Tensor, t: Tensor) -> Tensor:
        """The difference [B, C, H, W] that the distance is taken of."""
        return off

    def scaled(self, sigma: float) -> float:
        """A paper's noise level for sigma_data 0.5, scaled to this task."""
        return sigma * self.task.data_std / 0.5

    def karras(self, count: int) -> Tensor:
        """Karras' grid of `count` levels, then 0."""
        return karras_levels(count, self.schedule, smallest=self.scaled(0.002))


class CTConfig(HuberConfig, DataConfig):
    loss: Literal["huber", "l2"] = "l2"
    """Distance d: pseudo-Huber, or the mean square (paper: this or LPIPS)."""
    levels_from: int = Field(2, ge=2, le=10000)
    """Number of levels at the start (s_0)."""
    levels_to: int = Field(150, ge=2, le=10000)
    """Number of levels at the end (s_1)."""
    curriculum_steps: int = Field(400, ge=1, le=10**8)
    """Steps in which the number of levels grows to `levels_to` (paper: the whole run)."""
    target_half_life: float = Field(13.5, gt=0, le=1e6)
    """Half-life of the target average in steps (paper: it grows)."""


@METHODS.register("consistency-training")
class CT(ConsistencyTraining):
    """Consistency training (CT) on data alone, with an EMA target network."""

    Config = CTConfig
    tunes: ClassVar = {
        "lr": Span(1e-4, 1e-2, log=True),
        "loss": ("l2", "huber"),
        "curriculum_steps": (150, 400, 1000),
        "target_half_life": Span(3.0, 100.0, log=True),
    }
    reference: ClassVar = "Song et al. 2023, arXiv 2303.01469, alg. 3 and appendix C"

    def __init__(
        self,
        config: CTConfig,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        super().__init__(config, teacher, task, num_steps, total_steps, config.target_half_life)

    def grid(self, step: int) -> Tensor:
        """`N(k) = ceil(sqrt(k / K ((s_1 + 1)^2 - s_0^2) + s_0^2) - 1) + 1` levels, then 0."""
        first, last = self.config.levels_from, self.config.levels_to
        done = min(step / self.config.curriculum_steps, 1.0)
        return self.karras(
            math.ceil(math.sqrt(done * ((last + 1) ** 2 - first**2) + first**2) - 1) + 1
        )

    def pairs(self, batch: Batch, step: int) -> Pair:
        grid = self.grid(step).to(batch.index.device)
        place = (batch.uniform("level") * (len(grid) - 1)).long()
        return grid[place], grid[place + 1]

    def weight(self, sigma_t: Tensor, sigma_s: Tensor) -> Tensor:
        return torch.ones_like(sigma_t)

    def evened(self, off: Tensor, t: Tensor) -> Tensor:
        return self.conditioned(off, t)


class LogNormalConfig(HuberConfig, DataConfig, TimesConfig):
    level_mean: float = Field(-1.1, ge=-10, le=10)
    """Mean of log sigma, for sigma_data 0.5."""
    level_std: float = Field(2.0, gt=0, le=10)
    """Standard deviation of log sigma."""


class ICTConfig(LogNormalConfig):
    levels_from: int = Field(10, ge=2, le=10000)
    """Number of levels at the start (s_0)."""
    levels_to: int = Field(1280, ge=2, le=100000)
    """Number of levels at the end (s_1)."""
    stage_steps: int = Field(60, ge=1, le=10**8)
    """Steps after which the number of levels doubles (paper: an eighth of the run)."""


@METHODS.register("ict")
class ICT(ConsistencyTraining):
    """Improved consistency training (iCT) on data alone: no EMA target, pseudo-Huber loss."""

    Config = ICTConfig
    tunes: ClassVar = {
        "lr": Span(1e-4, 1e-2, log=True),
        "stage_steps": (30, 60, 120),
        "huber_c": Span(1e-4, 1e-1, log=True),
        "uniform": (0.1, 0.3, 0.6),
    }
    reference: ClassVar = "Song & Dhariwal 2023, arXiv 2310.14189, table 1 and sec. 3"

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        if config.levels_from > config.levels_to:
            raise UsageError(
                f"levels_from is {config.levels_from}, but must not exceed levels_to, "
                f"which is {config.levels_to}"
            )

    def grid(self, step: int) -> Tensor:
        """`N(k) = min(s_0 2^floor(k / K'), s_1) + 1` levels, then 0; K' is `stage_steps`."""
        first, last = self.config.levels_from, self.config.levels_to
        doublings = min(step // self.config.stage_steps, math.ceil(math.log2(last / first)))
        return self.karras(min(first * 2**doublings, last) + 1)

    def pairs(self, batch: Batch, step: int) -> Pair:
        """Neighbouring levels, drawn with probability proportional to

        `erf((log sigma_t - m) / sqrt2 std) - erf((log sigma_s - m) / sqrt2 std)`. The share
        `uniform` starts at the level above a uniform timestep.
        """
        grid = self.grid(step).to(batch.index.device)
        mean = self.config.level_mean + math.log(self.task.data_std / 0.5)
        edges = torch.erf(
            (torch.log(sigma_ve(self.schedule, grid).clamp(max=1e6)) - mean)
            / (math.sqrt(2) * self.config.level_std)
        )
        share = (edges[:-1] - edges[1:]).cumsum(0)
        place = torch.searchsorted(share / share[-1], batch.uniform("level")).clamp(
            max=len(grid) - 2
        )
        t = self.with_uniform(batch, grid[place])
        place = (grid.unsqueeze(0) >= t.unsqueeze(1)).sum(1).clamp(max=len(grid) - 1) - 1
        return grid[place], grid[place + 1]


class ECTConfig(LogNormalConfig):
    huber_c: float = Field(1e-6, gt=0, le=1e3)
    """c of pseudo-Huber for one dimension; the paper's 0 has no derivative at distance 0."""
    q: float = Field(2.0, gt=1, le=1e4)
    """Factor by which the gap shrinks from stage to stage."""
    stages: int = Field(8, ge=1, le=64)
    """Number of stages."""
    stage_steps: int = Field(60, ge=1, le=10**8)
    """Steps of a stage (paper: an eighth of the run); the last goes on to the end."""


@METHODS.register("ect")
class ECT(ConsistencyTraining):
    """Easy consistency tuning (ECT) on data alone: from denoising to consistency in stages."""

    Config = ECTConfig
    tunes: ClassVar = {
        "lr": Span(1e-4, 1e-2, log=True),
        "stage_steps": (30, 60, 120),
        "huber_c": Span(1e-6, 1e-1, log=True),
        "uniform": (0.1, 0.3, 0.6),
    }
    reference: ClassVar = "Geng et al. 2024, arXiv 2406.14548, eq. 13 to 15"

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        if config.stages * math.log(config.q) > -math.log(SMALLEST_GAP):
            raise UsageError(
                f"q is {config.q:g} and stages {config.stages}, "
                f"but q ** stages must not exceed {1 / SMALLEST_GAP:g}: "
                "beyond it float32 does not separate the last two noise levels"
            )

    def pairs(self, batch: Batch, step: int) -> Pair:
        largest = largest_sigma(self.schedule)
        log_sigma = (
            self.config.level_mean + self.config.level_std * batch.normal("level", ()).double()
        )
        sigma = (self.scaled(1.0) * log_sigma.exp()).clamp(self.scaled(1e-4), largest)
        t = torch.where(sigma < largest, self.schedule.time_of(sigma), 1.0)
        t = self.with_uniform(batch, t)
        return t, self.before(t, step)

    def before(self, t: Tensor, step: int) -> Tensor:
        """The timesteps r below t [B], at a step of the run."""
        sigma_t = sigma_ve(self.schedule, t).clamp(max=largest_sigma(self.schedule))
        stage = min(step // self.config.stage_steps, self.config.stages - 1)
        kept = 1 - self.config.q ** -(stage + 1) * (
            1 + 8 * torch.sigmoid(-sigma_t / self.scaled(1.0))
        )
        sigma_s = sigma_t * kept.clamp(min=0)
        return torch.where(sigma_s > 0, self.schedule.time_of(sigma_s), 0.0)
