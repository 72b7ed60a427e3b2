"""Reflow and its one-step distillation (Liu et al. 2022, arXiv 2209.03003, sec. 2.2 and 3).

A new flow is trained along the straight lines between the teacher's pairs (x_T, x_0):

    L = |u(x_tau, tau) - (x_T - x_0)|^2,    x_tau = tau x_T + (1 - tau) x_0

Its paths are straighter than the teacher's, so few Euler steps follow them. The last part of a run
for one step (`distill_from`) regresses the same pairs in that step alone, |x_0(x_T) - x_0|^2. The
paper first draws new pairs from the reflowed model.

The network is the task's own: x_tau times a constant is its x_t at the same signal-to-noise ratio,
u is its eps - x_0, and Euler's step is DDIM's (`parts/student.py`).

Times are uniform in the schedule's t, which on the paper's flow is uniform in tau. On DiT's
schedule tau is above 0.99 for t > 0.95, so uniform tau would hardly visit the levels of the first
steps. An eps network's difference of velocities is taken times alpha_t
(`DenoisingStudent.conditioned`).

Untrained: the student is the unguided teacher under S-step DDIM. In expectation: the gradient is 0
at u = E[x_T - x_0 | x_tau].
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from harness.diffusion.denoiser import Guided
from harness.methods.base import METHODS, Batch, Problem, Update
from harness.methods.parts.options import Span
from harness.methods.parts.student import DenoisingStudent, StudentConfig, velocity
from harness.solvers import DDIM


class ReflowConfig(StudentConfig):
    distill_from: float = Field(0.5, ge=0, le=1)
    """Fraction of a run for one step after which that step trains alone; 1 is never."""


@METHODS.register("reflow")
class Reflow(DenoisingStudent):
    """Reflow: a flow on straight lines from noise to teacher samples, then one step of it."""

    Config = ReflowConfig
    tunes: ClassVar = {
        "lr": Span(1e-4, 1e-2, log=True),
        "weight_decay": (0.0, 0.01, 0.1),
        "ema_half_life": (0.02, 0.05, 0.1),
    }
    sources = frozenset({"trajectory"})
    reference: ClassVar = (
        "Liu et al. 2022, arXiv 2209.03003, eq. 1 and sec. 2.2; "
        "Liu et al. 2023, arXiv 2309.06380, eq. 6"
    )

    def __init__(
        self,
        config: ReflowConfig,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        super().__init__(config, teacher, task, num_steps, total_steps)
        self.solver = DDIM()
        self.last_part = round(config.distill_from * total_steps) if num_steps == 1 else total_steps

    @classmethod
    def canonical(cls, config: Any, num_steps: int) -> tuple[str, Any]:
        return METHODS.name_of(cls), config if num_steps == 1 else config.model_copy(
            update={"distill_from": 0.5}
        )

    def updates(self, step: int) -> Iterable[Update]:
        return [Update("student", partial(self.loss_at, last=step >= self.last_part))]

    def loss_at(self, batch: Batch, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at random times, or under `last` at pure noise alone."""
        path = batch.trajectory
        assert path is not None
        x_T, x_0 = path.states[:, 0], path.states[:, -1]
        t = torch.ones(len(x_T), dtype=torch.float64, device=x_T.device)
        if last:
            off = self.model(x_T, t, path.cond).x_0 - x_0
        else:
            t = batch.uniform("t").clamp(min=1e-3)
            off = velocity(self.model(self.noised(x_0, x_T, t), t, path.cond)) - (x_T - x_0)
        return self.conditioned(off, t).square().mean(), {"mse": off.detach().square().mean()}
