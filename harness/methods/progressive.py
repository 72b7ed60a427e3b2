"""Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512, alg. 2).

In each round one DDIM step of the student, from t to s, learns to equal two of the teacher, from t
to m to s. The x_0 for such a step is (eq. 8 and 9)

    x~ = (z_s - (sigma_s / sigma_t) z_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)
    L = max(SNR_t, 1) |x^ - x~|^2

The paper trains v and x_0 networks, since an eps network's x_0 has unbounded errors at pure noise.
Here an eps network's difference is taken times alpha_t, which weighs it as a v network's
(`DenoisingStudent.conditioned`).

On the last interval, s = 0, x~ is z_s, the teacher's x_0-prediction. After a round the student
becomes the teacher, and the number of steps halves. Rounds are equal parts of the run; in each the
learning rate falls linearly.

Untrained: the student is the unguided teacher under S-step DDIM. Exact: the loss is 0 if one step
of the student ends where two of the teacher end.
"""

from __future__ import annotations

import copy
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from harness.diffusion.denoiser import Guided, Model, expand_to
from harness.diffusion.schedules import NUM_LEVELS, few_step_levels
from harness.errors import UsageError
from harness.methods.base import METHODS, Batch, Problem, Update
from harness.methods.parts.options import Span
from harness.methods.parts.student import DenoisingStudent, StudentConfig
from harness.solvers import DDIM
from harness.solvers.ddim import ddim_step, implied_x_0


class ProgressiveConfig(StudentConfig):
    rounds: int = Field(3, ge=1, le=10)
    """Number of halvings; the first teacher takes num_steps 2^rounds steps."""
    truncation: float = Field(1.0, ge=0, le=1e3)
    """Smallest weight of the loss, max(SNR, .)."""


@METHODS.register("progressive")
class Progressive(DenoisingStudent):
    """Progressive distillation: one DDIM step learns two, in rounds that halve the steps."""

    Config = ProgressiveConfig
    tunes: ClassVar = {
        "lr": Span(1e-4, 1e-2, log=True),
        "rounds": (1, 2, 3),
        "truncation": (0.0, 1.0, 5.0),
    }
    reference: ClassVar = "Salimans & Ho 2022, arXiv 2202.00512, alg. 2, eq. 8 and 9"

    def __init__(
        self,
        config: ProgressiveConfig,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        super().__init__(config, teacher, task, num_steps, total_steps)
        self.solver = DDIM()
        if 0 < total_steps < config.rounds:
            raise UsageError(
                f"rounds is {config.rounds}, but the run has {total_steps} steps: "
                "give at most as many rounds"
            )
        self.ends = [round(total_steps * (i + 1) / config.rounds) for i in range(config.rounds)]
        self.student_player.rate = self.rate
        self.earlier = self.as_denoiser(
            copy.deepcopy(self.student_player.module).requires_grad_(False).eval()
        )

    @staticmethod
    def student_updates(config: Any, total_steps: int) -> int:
        return -(-total_steps // config.rounds)

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        if (first := num_steps * 2**config.rounds) > NUM_LEVELS:
            raise UsageError(
                f"rounds is {config.rounds}, so the first teacher would take {first} steps, "
                f"but there are {NUM_LEVELS} levels: give fewer"
            )

    def rate(self, progress: float) -> float:
        """The factor of the learning rate: in each round a warm-up, then linear to 0."""
        step = round(progress * self.ends[-1])
        number = bisect_left(self.ends, step)
        start = self.ends[number - 1] if number else 0
        place = (step - start) / max(self.ends[number] - start, 1)
        return (
            min(place / self.config.warmup, 1.0) * (1 - place) if self.config.warmup else 1 - place
        )

    def updates(self, step: int) -> Iterable[Update]:
        number = bisect_right(self.ends, step)
        return [
            Update(
                "student",
                partial(self.loss_in, number=number),
                "first round" if number == 0 else "later",
            )
        ]

    def loss_in(self, batch: Batch, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss in round `number`.

        The teacher is the task's in the first round, and then the student of the round before.
        """
        assert batch.data is not None
        x_0, cond = batch.data
        teacher: Model = self.teacher if number == 0 else self.earlier
        steps = (len(self.levels) - 1) * 2 ** (self.config.rounds - 1 - number)
        grid, place = (
            few_step_levels(2 * steps).to(x_0.device),
            (batch.uniform("level") * steps).long(),
        )
        t, m, s = (grid[2 * place + i] for i in range(3))
        z_t = self.noised(x_0, batch.normal("eps", x_0.shape[1:]), t)
        with torch.no_grad():
            z_m = ddim_step(teacher(z_t, t, cond), m, self.schedule)
            z_s = ddim_step(teacher(z_m, m, cond), s, self.schedule)
            target = implied_x_0(z_t, z_s, t, s, self.schedule)
        alpha, sigma = self.schedule.alpha_sigma(t)
        off = self.model(z_t, t, cond).x_0 - target
        weight = expand_to(((alpha / sigma) ** 2).clamp(min=self.config.truncation), off)
        loss = (weight * self.conditioned(off, t).square()).mean()
        return loss, {"mse": off.detach().square().mean()}

    def end_step(self, step: int, means: dict[str, float]) -> Collection[str]:
        if step + 1 not in self.ends[:-1]:
            return ()
        assert self.student_player.ema is not None
        average = self.student_player.ema.module.state_dict()
        self.earlier.network.load_state_dict(average)
        self.student_player.module.load_state_dict(average)
        return ("student",)

    @property
    def networks(self) -> list[nn.Module]:
        return [*super().networks, self.earlier]

    def state_dict(self) -> dict[str, Any]:
        return dict(self.earlier.network.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.earlier.network.load_state_dict(state)
