"""LADD, latent adversarial diffusion distillation (Sauer et al. 2024, arXiv 2403.12015).

The student maps a teacher's sample, noised to one of its own levels, back to x_0 in one step. Heads
on a frozen teacher's blocks (`networks/discriminator.py`) discriminate between this x_0 and the
teacher's samples, both noised again. The hinge loss is the only loss:

    L_student = -D(noised x^_0),    L_D = max(0, 1 - D(noised x_0)) + max(0, 1 + D(noised x^_0))

Ours: the timestep at the discriminator's input is uniform up to `gan_max_time`, the student's level
is uniform over its steps, logits are averaged over heads and tokens, and heads are not clipped.

Untrained: the first step is the unguided teacher's x_0-prediction. Saddle point: if the student has
the teacher's distribution, the best discriminator is 0 everywhere and the student's gradient is 0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from harness.diffusion.denoiser import Guided
from harness.errors import UsageError
from harness.methods.base import METHODS, Batch, Problem, Update
from harness.methods.parts.adversarial import Critic
from harness.methods.parts.options import Span
from harness.methods.parts.student import DenoisingStudent, StudentConfig


class LADDConfig(StudentConfig):
    lr: float = Field(1e-4, gt=0, le=1)
    """Peak learning rate of AdamW."""
    gan_lr: float = Field(1e-3, gt=0, le=1)
    """Learning rate of the discriminator's heads."""
    gan_max_time: float = Field(1.0, gt=0, le=1)
    """Largest timestep of the noised discriminator input."""
    gan_virtual_batch: int = Field(8, ge=1, le=4096)
    """Number of samples that the heads normalise together."""

    @property
    def sample_group(self) -> int:
        return self.gan_virtual_batch


@METHODS.register("ladd")
class LADD(DenoisingStudent):
    """Latent adversarial distillation: only a GAN loss, on features of the frozen teacher."""

    Config = LADDConfig
    tunes: ClassVar = {
        "lr": Span(1e-5, 1e-3, log=True),
        "gan_lr": Span(1e-4, 1e-2, log=True),
        "gan_max_time": (0.25, 0.5, 1.0),
    }
    sources = frozenset({"trajectory"})
    reference: ClassVar = (
        "Sauer et al. 2024, arXiv 2403.12015, sec. 3; "
        "hinge: Sauer et al. 2023, arXiv 2311.17042, eq. 2 and 3"
    )

    def __init__(
        self,
        config: LADDConfig,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        super().__init__(config, teacher, task, num_steps, total_steps)
        self.critic = Critic(
            self.teacher,
            task,
            config.gan_lr,
            config.gan_virtual_batch,
            config.gan_max_time,
        )
        self.players["discriminator"] = self.critic.player

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        if not task.network_teacher:
            raise UsageError(
                "ladd needs a teacher that is a network, but this task's is a closed formula: "
                "give another task"
            )

    def updates(self, step: int) -> Iterable[Update]:
        return [Update("student", self.loss), Update("discriminator", self.discriminator_loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        path = batch.trajectory
        assert path is not None
        steps = len(self.levels) - 1
        place = (batch.uniform("level") * steps).long()
        t = self.levels.to(path.states.device)[place]
        x_t = self.noised(path.states[:, -1], batch.normal("eps", path.states.shape[2:]), t)
        x_0 = self.with_gradient(self.model(x_t, t, path.cond).x_0, t)
        batch.carry["x_0"] = x_0.detach()
        loss = -self.critic.logits(x_0, path.cond, batch, "student").mean()
        return loss, {"distance": (x_0.detach() - path.states[:, -1]).square().mean()}

    def discriminator_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The hinge loss on the teacher's samples and the student's x_0 in the carry."""
        path = batch.trajectory
        assert path is not None
        return self.critic.hinge(
            (path.states[:, -1], path.cond), (batch.carry["x_0"], path.cond), batch
        )

    def end_step(self, step: int, means: dict[str, float]) -> Collection[str]:
        self.critic.heads.power_iteration()
        return super().end_step(step, means)
