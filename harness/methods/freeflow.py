"""FreeFlow (arXiv 2511.19428): a flow map that a teacher gives, without data.

The student jumps from noise z at flow time 1 to any rho, `f(z, rho) = z - (1 - rho) U(z, rho)`. As
rho falls, the end should move with the guided teacher's velocity there. With d = 1 - rho,

    g = v_T(f, rho) - d dU/dd - U,    L = w |U - sg(U + g)|^2,    w = 1 / (|g|^2 / D + c)^k

dU/dd moves rho alone: it is a central difference unless `derivative` says otherwise. Only noise and
labels are read. An end's error moves the points where the next ends are learned, so errors grow.
A quarter of each batch corrects them. Its samples x = f(z, 0) are noised, and a fake score says the
velocity of noised samples:

    L = |U - sg(U + q (v_T(x_s) - v_fake(x_s)))|^2

q makes both parts alike: it is the ratio of their gradients' mean norms in the step before, at most
10, times `correction`. The fake score learns in every step (`parts/matching.py`).

Only summaries of the paper were at hand. Decided here: rho is uniform; c; q's bound, lag and where
it applies; the timesteps x_s, which are DMD2's; and that the fake score learns from a whole batch.
The labels are those of the task's data. The loss of an eps network is taken times alpha at pure
noise after it is weighted (`DenoisingStudent.conditioned`). There is one step alone, since the
network sees pure noise alone.

Untrained, from the teacher's weights: the student is the unguided teacher under 1-step DDIM.
Exact: g is 0 at the teacher's own mean velocities. The correction is 0 where the fake score is the
guided teacher.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Guided, expand_to
from harness.errors import UsageError
from harness.methods.base import METHODS, Batch, Problem, Update
from harness.methods.parts.derivatives import STEP, Derivative, DerivativeConfig, with_derivative
from harness.methods.parts.matching import Matching, MatchingConfig
from harness.methods.parts.options import Span
from harness.methods.parts.samplers import Jumps
from harness.methods.parts.student import DenoisingStudent, time_of_flow

KINDS, LARGEST_RATIO = 4, 10.0
"""Of so many samples one corrects (paper: a quarter), and the bound of q."""


class FreeFlowConfig(DerivativeConfig):
    derivative: Derivative = Field("difference")
    """How the student's derivative is computed: as a central difference, which runs with any
    attention kernel, or exactly, by forward mode. Both take three forwards."""
    power: float = Field(1.0, ge=0, le=2)
    """Power k of the adaptive weight; 0 is the plain squared error."""
    weight_floor: float = Field(1e-2, gt=0, le=1e3)
    """Constant c of the adaptive weight."""
    correction: float = Field(1.0, ge=0, le=1e3)
    """Size of the correction's gradient beside that of the prediction's."""
    fake_lr: float = Field(1e-3, gt=0, le=1)
    """Peak learning rate of the fake score."""

    @property
    def sample_group(self) -> int:
        return KINDS


def part(batch: Batch, rows: Tensor) -> Batch:
    """The samples of a batch where rows [B] is true."""
    assert batch.data is not None
    images, cond = batch.data
    return replace(batch, index=batch.index[rows], data=(images[rows], cond[rows]))


@METHODS.register("freeflow")
class FreeFlow(DenoisingStudent):
    """FreeFlow: a map from noise that follows the teacher's velocity, corrected by a fake score."""

    Config = FreeFlowConfig
    tunes: ClassVar = {
        "lr": Span(1e-4, 1e-2, log=True),
        "fake_lr": Span(1e-4, 1e-2, log=True),
        "power": (0.0, 0.5, 1.0),
        "correction": (0.3, 1.0, 3.0),
    }
    default_num_steps = 1
    scalars = ("target",)
    reference: ClassVar = "arXiv 2511.19428, from summaries"

    def __init__(
        self,
        config: FreeFlowConfig,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        super().__init__(config, teacher, task, num_steps, total_steps)
        self.solver = Jumps(lambda t, s: {"target": self.schedule.network_time(s)})
        shared = config.model_dump(include={"fake_lr", "weight_decay", "clip", "warmup"})
        options = MatchingConfig(student_gan=0.0, fake_gan=0.0, **shared)
        self.matching = Matching(options, self.teacher, task, self.starts_as_teacher)
        self.players["fake_score"] = self.matching.player
        self.ratio = 1.0

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        if num_steps != 1:
            raise UsageError(f"num_steps is {num_steps}, but freeflow has one step: give 1")

    def updates(self, step: int) -> Iterable[Update]:
        return [Update("student", self.loss), Update("fake_score", self.fake_loss)]

    def noise(self, batch: Batch, name: str) -> Tensor:
        """Pure noise z in flow coordinates, [B, C, H, W]."""
        alpha, sigma = self.schedule.alpha_sigma(torch.ones(()))
        z = batch.normal(name, self.task.shape)
        return z / expand_to(alpha + sigma, z)

    def U(self, z: Tensor, rho: Tensor, cond: Condition) -> Tensor:
        """The student's mean velocity from noise z [B, C, H, W] to flow times rho [B]."""
        told = {"target": self.schedule.network_time(time_of_flow(self.schedule, rho))}
        first = torch.full_like(rho, self.largest_tau)
        return self.velocity_at(self.model, z, first, cond.with_scalars(**told))

    def whole(self, z: Tensor, cond: Condition) -> Tensor:
        """U from noise z [B, C, H, W] to clean data."""
        return self.U(z, torch.zeros(len(z), dtype=torch.float64, device=z.device), cond)

    def prediction(self, z: Tensor, rho: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """U at noise z [B, C, H, W] and flow times rho [B], with gradients, and g without."""
        u, change = with_derivative(
            self.config.derivative,
            lambda rho: self.U(z, rho, cond),
            (rho,),
            (torch.ones_like(rho),),
            (rho.clamp(STEP, self.largest_tau - STEP),),
        )
        length, now = expand_to(self.largest_tau - rho, z), u.detach()
        # Like the student in the JVP: in bf16 its rounding would hide how the two differ.
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            v = self.velocity_at(self.teacher, z - length * now, rho, cond)  # type: ignore[arg-type]
        return u, v + length * change - now

    def correction(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """U to clean data of a batch, with gradients, and `v_T - v_fake` without."""
        assert batch.data is not None
        cond, z = batch.data[1], self.noise(batch, "z")
        u = self.whole(z, cond)
        with torch.no_grad():
            x_t, t = self.matching.noised(z - self.largest_tau * u, batch, "student")
            real, fake = (model(x_t, t, cond) for model in (self.teacher, self.matching.model))
            return u, (real.eps - real.x_0) - (fake.eps - fake.x_0)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        last = torch.arange(len(batch.index), device=batch.index.device) % KINDS == KINDS - 1
        mine, theirs = (part(batch, rows) for rows in (~last, last))
        assert mine.data is not None
        rho = mine.uniform("rho") * self.largest_tau
        u, g = self.prediction(self.noise(mine, "z"), rho, mine.data[1])
        weight = (g.square().mean((1, 2, 3), keepdim=True) + self.config.weight_floor) ** (
            -self.config.power
        )
        ends, off = self.correction(theirs)
        errors = torch.cat([u - (u.detach() + g), ends - (ends.detach() + self.ratio * off)])
        weights = torch.cat([weight, torch.ones_like(ends[:, :1, :1, :1])])
        errors = self.conditioned(errors, torch.ones((), dtype=torch.float64))
        norms = {"prediction": weight * g, "correction": off}
        return (weights * errors.square()).mean(), {
            name: x.flatten(1).norm(dim=1).mean() for name, x in norms.items()
        }

    def fake_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The fake score's loss on the student's samples."""
        assert batch.data is not None
        cond, z = batch.data[1], self.noise(batch, "fake z")
        with torch.no_grad():
            x = z - self.largest_tau * self.whole(z, cond)
        return self.matching.fake_loss(x, cond, batch)

    def end_step(self, step: int, means: dict[str, float]) -> Collection[str]:
        found = means["student/prediction"] / max(means["student/correction"], 1e-12)
        self.ratio = self.config.correction * min(found, LARGEST_RATIO)
        return super().end_step(step, means)

    def state_dict(self) -> dict[str, Any]:
        return {"ratio": self.ratio}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ratio = float(state["ratio"])
