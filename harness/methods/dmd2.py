"""DMD2, improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867).

The losses are those of `parts/matching.py`: distribution matching and a GAN. The fake score trains
in every step, the student in every fifth (two time scales). Under `renoising: decoupled` guidance
has a noise level of its own (Decoupled DMD, `parts/decoupled.py`). The student's first updates may
be eased (the dynamic parts of DMDR, `parts/dynamic.py`).

An eps network's errors move x_0 by sigma / alpha. So the loss's gradient with respect to x_0 is
taken times alpha_t of the trained step: all steps weigh as those of a v network
(`DenoisingStudent.conditioned`).

A student of several steps trains on inputs from its own sampling: its samples, noised to the next
level, without gradients (backward simulation). The trained step rotates from batch to batch.

Untrained: the first step is the unguided teacher's x_0-prediction. Exact: the gradient of
distribution matching is 0 if the fake score equals the guided teacher.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Denoiser, Guided
from harness.errors import UsageError
from harness.methods.base import METHODS, Batch, Problem, Update
from harness.methods.parts.decoupled import Decoupled
from harness.methods.parts.matching import Matching, MatchingConfig
from harness.methods.parts.options import Span
from harness.methods.parts.student import DenoisingStudent, StudentConfig


class DMD2Config(StudentConfig, MatchingConfig):
    added = frozenset(
        {"divergence", "renoising", "dynamic_guidance_updates", "dynamic_renoising_updates"}
    )
    lr: float = Field(3e-4, gt=0, le=1)
    """Peak learning rate of the student (paper: 2e-6 in hundreds of thousands of steps)."""
    renoising: Literal["shared", "decoupled"] = "shared"
    """Noise of the guidance in the gradient: that of the scores, or its own (Decoupled DMD), which
    needs guidance and the divergence reverse-kl."""


@METHODS.register("dmd2")
class DMD2(DenoisingStudent):
    """Distribution matching distillation (DMD2): a fake score, the teacher's score and a GAN."""

    Config = DMD2Config
    tunes: ClassVar = {
        "lr": Span(3e-5, 3e-3, log=True),
        "fake_lr": Span(1e-4, 1e-2, log=True),
        "student_every": (1, 2, 5),
        "student_gan": (0.001, 0.003, 0.03),
    }
    reference: ClassVar = (
        "Yin et al. 2024, arXiv 2405.14867, sec. 4; "
        "gradient: Yin et al. 2023, arXiv 2311.18828, eq. 7 and 8"
    )

    @staticmethod
    def student_updates(config: Any, total_steps: int) -> int:
        return -(-total_steps // config.student_every)

    def __init__(
        self,
        config: DMD2Config,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        super().__init__(config, teacher, task, num_steps, total_steps)
        matching = Decoupled if config.renoising == "decoupled" else Matching
        self.matching = matching(config, self.teacher, task, self.starts_as_teacher)
        self.players["fake_score"] = self.matching.player
        self.moved = self.matching.moved.network if self.matching.moved else None

    @property
    def networks(self) -> list[nn.Module]:
        return [*super().networks, *([self.moved] if self.moved else [])]

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        config.check_matching()
        if config.dynamic_guidance_updates and not (
            task.network_teacher and config.init == "teacher"
        ):
            raise UsageError(
                "dynamic_guidance_updates moves the real score between the weights of teacher and "
                "fake score, but this fake score starts from random ones: leave it out, or take "
                "init teacher and a teacher that is a network"
            )
        if config.renoising != "decoupled":
            return
        if task.guidance_scale == 1:
            raise UsageError(
                "renoising is decoupled, which at the task's guidance scale 1 equals shared: "
                "leave it out, or take a task with guidance"
            )
        if config.divergence != "reverse-kl":
            raise UsageError(
                f"renoising is decoupled and divergence is {config.divergence}, whose weights "
                "would scale the guidance too: give one of them"
            )

    def updates(self, step: int) -> Iterable[Update]:
        every, steps = self.config.student_every, len(self.levels) - 1
        update, found = step // every, []
        if step % every == 0:
            place = update % steps
            loss = partial(self.loss_at, place=place, update=update)
            found.append(Update("student", loss, f"step {place}"))
        place = step % steps
        loss = partial(self.fake_loss, place=place, update=update)
        return [*found, Update("fake_score", loss, f"step {place}")]

    def generate(
        self, model: Denoiser, cond: Condition, batch: Batch, place: int, name: str
    ) -> Tensor:
        """The student's x_0 at step `place` of its sampling; gradients flow through that step."""
        levels = self.levels[: place + 1].to(batch.index.device)
        return self.simulated(model, levels, cond, batch, name)

    def loss_at(
        self, batch: Batch, place: int, update: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's loss at step `place`, in its update number `update`."""
        assert batch.data is not None
        cond = batch.data[1]
        x, start = self.generate(self.model, cond, batch, place, "student"), self.levels[place]
        return self.matching.student_loss(x, cond, batch, float(start), update)

    def fake_loss(
        self, batch: Batch, place: int, update: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The fake score's loss on the student's samples at step `place`, after that update."""
        assert batch.data is not None
        cond = batch.data[1]
        with torch.no_grad():
            x = self.generate(self.model, cond, batch, place, "fake")
        return self.matching.fake_loss(x, cond, batch, update)
