"""Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512, alg. 2).

In each round the student learns to do in one DDIM step, from t to s, what the teacher does in two, from t to m to s. The x_0 that
one step needs for that is

    x~ = (z_s - (sigma_s / sigma_t) z_t) / (alpha_s - (sigma_s / sigma_t) alpha_t),    L = max(SNR_t, 1) |x^ - x~|^2

(eq. 8 and 9); on the last interval, s = 0, it is z_s, the teacher's x_0-prediction. Then the student becomes the teacher and the
number of steps is halved. The rounds share the run in equal parts; the learning rate falls along a line in each.

Untrained, the student is the unguided teacher under S-step DDIM. Exact: where one step of the student lands where two of the
teacher do, the loss is 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from harness.conditions import Condition
from harness.denoiser import Guided, Model, like
from harness.methods.base import EMA, METHODS, Batch, Problem
from harness.methods.student import DenoisingStudent, StudentConfig, jump_untrained
from harness.schedules import few_step_levels
from harness.solvers import DDIM
from harness.solvers.ddim import ddim_step, implied_x_0


class ProgressiveConfig(StudentConfig):
    rounds: int = Field(3, ge=1, le=10)
    """How often the steps are halved; the first teacher takes num_steps 2^rounds."""
    truncation: float = Field(1.0, ge=0, le=1e3)
    """Smallest weight of a loss, max(SNR, .)."""


@METHODS.register("progressive")
class Progressive(DenoisingStudent):
    """One step learns what two do, again and again."""

    Config = ProgressiveConfig
    reference: ClassVar = "Salimans & Ho 2022, arXiv 2202.00512, alg. 2, eq. 8 and 9"

    def __init__(self, config: ProgressiveConfig, teacher: Guided | None, task: Problem, num_steps: int, total_steps: int):
        super().__init__(config, teacher, task, num_steps, total_steps)
        self.solver, self.num_steps, self.round = DDIM(), num_steps, 0
        self.round_steps = -(-total_steps // config.rounds)
        player = self.student_player
        player.ema = EMA(player.module, config.ema_half_life, self.round_steps)
        player.rate = self.rate
        self.student = self.seen(player.ema.module)
        self.earlier = self.seen(copy.deepcopy(player.module).requires_grad_(False).eval())

    def rate(self, progress: float) -> float:
        """Warm-up and a line to 0 in each round."""
        place = progress * self.total_steps / self.round_steps % 1 or 1.0
        return min(place / self.config.warmup, 1.0) * (1 - place) if self.config.warmup else 1 - place

    def untrained(self) -> Callable[[Tensor, Condition], Tensor] | None:
        return jump_untrained(self)

    @property
    def master(self) -> Model:
        """The teacher of this round: the task's, then the student of the round before."""
        return self.teacher if self.round == 0 else self.earlier

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.data is not None
        x_0, cond = batch.data
        steps = self.num_steps * 2 ** (self.config.rounds - 1 - self.round)
        grid, place = few_step_levels(2 * steps).to(x_0.device), (batch.uniform("level") * steps).long()
        t, m, s = (grid[2 * place + i] for i in range(3))
        z_t = self.noised(x_0, batch.normal("eps", x_0.shape[1:]), t)
        with torch.no_grad():
            z_m = ddim_step(self.master(z_t, t, cond), m, self.schedule)
            z_s = ddim_step(self.master(z_m, m, cond), s, self.schedule)
            target = implied_x_0(z_t, z_s, t, s, self.schedule)
        alpha, sigma = self.schedule.alpha_sigma(t)
        off = (self.model(z_t, t, cond).x_0 - target).square()
        weight = like(((alpha / sigma) ** 2).clamp(min=self.config.truncation), off)
        return (weight * off).mean(), {"mse": off.detach().mean()}

    def end_step(self, step: int, means: dict[str, float]) -> Collection[str]:
        if (step + 1) % self.round_steps or step + 1 >= self.total_steps:
            return ()
        assert self.student_player.ema is not None
        self.earlier.network.load_state_dict(self.student_player.ema.module.state_dict())
        self.student_player.module.load_state_dict(self.student_player.ema.module.state_dict())
        self.round += 1
        return ("student",)

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.earlier.to(device)

    def state_dict(self) -> dict[str, Any]:
        return {"round": self.round, **self.earlier.network.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        weights = dict(state)
        self.round = weights.pop("round")
        self.earlier.network.load_state_dict(weights)
