"""Distribution matching: a fake score and its losses (DMD2, Yin et al. 2024, arXiv 2405.14867).

A sample x of the student is noised to x_t and moved along the difference of two denoisers: the
guided teacher and a fake score, which is trained on the student's samples.

    grad = (x_fake(x_t) - x_real(x_t)) / mean |x - x_real|,    L = 1/2 |x - sg(x - grad)|^2
    L_fake = |F(x_t) - F|^2

F is the quantity that the fake score's network predicts, eps or v. The paper weights the error of
x_0 by SNR + 1 / sd^2, which for its EDM networks is 1 / c_out^2 and gives the same loss.

A head on the fake score's features classifies noised images as real or fake. The fake score adds
`softplus(D(fake)) + softplus(-D(real))` to its loss, the student `softplus(-D(fake))`.

f-distill (Xu et al. 2025, arXiv 2502.15681) weighs the gradient of each sample by h / mean h, for
another divergence than the reverse KL. h is a function of the ratio r of the real density to the
student's, which is exp D: r for KL, r / (1 + r) for Jensen-Shannon, sqrt r for squared Hellinger,
1 + r for Jeffreys. r is cut to [0.1, 20] and divided by its mean in a tenth of the timesteps.

The first updates of the student may be eased by DMDR's dynamic parts (`dynamic.py`).

`dmd2.py` trains a student by these losses alone. With `dmd_from` they finish a student of
trajectories on its last state (`step_distillation.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Denoiser, Guided, expand_to, of_pair
from harness.errors import UsageError
from harness.methods.base import Batch, Loss, Problem, Update
from harness.methods.parts.dynamic import Moved, eased, renoised
from harness.methods.parts.options import OptimizerConfig
from harness.methods.parts.players import Player, cosine
from harness.networks.backbones import Backbone, build

Divergence = Literal["reverse-kl", "kl", "js", "hellinger", "jeffreys"]
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "hellinger": torch.sqrt,
    "jeffreys": lambda r: 1 + r,
}
"""The weight h of a divergence, from the ratio of real to generated density."""
Noised = tuple[Tensor, Tensor]
Below = Callable[[], Noised]
RATIOS, TIME_BINS = (0.1, 20.0), 10
"""Bounds of the ratio, and the parts of the timesteps in which its mean is taken."""


class MatchingConfig(OptimizerConfig):
    """Options of distribution matching."""

    fake_lr: float = Field(1e-3, gt=0, le=1)
    """Peak learning rate of the fake score and its head."""
    student_every: int = Field(5, ge=1, le=100)
    """Updates of the fake score for each update of the student."""
    student_gan: float = Field(3e-3, ge=0, le=1e3)
    """Weight of the GAN in the student's loss; 0 here and in fake_gan turns it off."""
    fake_gan: float = Field(1e-2, ge=0, le=1e3)
    """Weight of the GAN in the fake score's loss."""
    min_time: float = Field(0.02, gt=0, lt=1)
    """Smallest timestep of the compared scores."""
    max_time: float = Field(0.98, gt=0, lt=1)
    """Largest timestep of the compared scores."""

    divergence: Divergence = "reverse-kl"
    """The divergence from data to the student that is minimised; others than DMD2's reverse KL
    weigh samples by what the GAN's head says (f-distill)."""
    dynamic_guidance_updates: int | None = Field(None, ge=1, le=10**7)
    """First updates of the student, in which the real score's weights return from the fake score to
    the teacher (DMDR); none means the teacher throughout. Needs a student from its weights."""
    dynamic_renoising_updates: int | None = Field(None, ge=1, le=10**7)
    """First updates of the student, in which the timesteps of the compared scores go from high
    noise to uniform ones (DMDR); none means uniform throughout."""

    @property
    def whole_batch(self) -> bool:
        return self.divergence != "reverse-kl"  # weights are relative to a batch's mean

    def check_matching(self) -> None:
        """Raises UsageError for contradictory options."""
        if self.min_time >= self.max_time:
            raise UsageError(
                f"min_time is {self.min_time:g}, but must be below max_time, "
                f"which is {self.max_time:g}"
            )
        if bool(self.student_gan) != bool(self.fake_gan):
            raise UsageError(
                "student_gan and fake_gan are the two sides of one GAN: "
                "give both above 0, or both as 0"
            )
        if self.divergence != "reverse-kl" and not self.student_gan:
            raise UsageError(
                f"divergence is {self.divergence}, but its weights come from the GAN's head: "
                "give student_gan and fake_gan above 0"
            )


class FakeScore(nn.Module):
    """A network, and a head that classifies real and generated images.

    The head reads the mean of the tokens after the middle block.
    """

    def __init__(self, network: Backbone):
        super().__init__()
        width = network.width
        self.network = network
        self.head = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def logit(self, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        """Logits [B], positive for real images."""
        tokens, _ = self.network.features(x_t, time, cond, (self.network.depth + 1) // 2)
        *_, middle = tokens
        return self.head(middle.mean(1)).squeeze(-1).float()


class Matching:
    """A fake score, its player and both losses.

    Args:
        starts_as_teacher: whether the fake score starts from the teacher's weights. From random
            weights it predicts v.
    """

    def __init__(
        self, config: MatchingConfig, teacher: Guided, task: Problem, starts_as_teacher: bool
    ):
        self.config, self.teacher, self.task = config, teacher, task
        network = build(task.network_options)
        if starts_as_teacher:
            network.load_teacher(teacher.denoiser.network.state_dict())
        self.fake = FakeScore(network)
        optimizer = torch.optim.AdamW(
            self.fake.parameters(),
            config.fake_lr,
            betas=(0.9, 0.999),
            weight_decay=config.weight_decay,
        )
        self.player = Player(self.fake, optimizer, config.clip, rate=cosine(config.warmup))
        self.model = Denoiser(
            network, task.schedule, task.prediction_type if starts_as_teacher else "v"
        )
        self.moved = Moved(teacher, network) if config.dynamic_guidance_updates else None

    def noised(
        self, x: Tensor, batch: Batch, name: str, highest: float = 1.0, a: float = 0.0
    ) -> Noised:
        """Images x [B, C, H, W] noised to random timesteps, and these timesteps [B].

        Args:
            highest: a bound of the timesteps beside the option's.
            a: how far their law is from the uniform one (`renoised`).
        """
        low, high = self.config.min_time, min(self.config.max_time, highest)
        t = low + renoised(batch.uniform(f"{name} t"), a) * (high - low)
        alpha, sigma = (expand_to(c, x) for c in self.task.schedule.alpha_sigma(t))
        return alpha * x + sigma * batch.normal(f"{name} eps", x.shape[1:]), t

    def student_loss(
        self, x: Tensor, cond: Condition, batch: Batch, start: float = 1.0, update: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's loss on samples x of a step from `start`; gradients flow through x.

        Args:
            update: the number of the student's update.
        """
        x_t, t = self.noised(x, batch, "student", a=self.renoising(update))
        with torch.no_grad():
            below = partial(self.noised, x, batch, "guidance", start)
            off, real = self.difference(self.real_score(update), x_t, t, cond, below)
            scale = (x - real).abs().flatten(1).mean(1).clamp(min=1e-4).reshape(-1, 1, 1, 1)
            gradient = off / scale * self.weights(x_t, t, cond)
        matching = 0.5 * (x - (x - gradient).detach()).square().mean()
        metrics = {"gradient": gradient.square().mean()}
        if not self.config.student_gan:
            return matching, metrics
        gan = F.softplus(-self.fake.logit(x_t, self.task.schedule.network_time(t), cond)).mean()
        return matching + self.config.student_gan * gan, metrics | {"gan": gan.detach()}

    def renoising(self, update: int) -> float:
        """a of the timesteps in the student's update."""
        return eased(update, self.config.dynamic_renoising_updates)

    def real_score(self, update: int) -> Guided:
        """The score that stands for the data's in the student's update: last the teacher's."""
        a = eased(update, self.config.dynamic_guidance_updates)
        return self.moved.at(a) if self.moved and a else self.teacher

    def difference(
        self, teacher: Guided, x_t: Tensor, t: Tensor, cond: Condition, below: Below
    ) -> tuple[Tensor, Tensor]:
        """`x_fake - x_real` at x_t, and x_real; `below` noises to below the step's start."""
        real = teacher(x_t, t, cond).x_0
        return self.model(x_t, t, cond).x_0 - real, real

    def weights(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """h / mean h of the divergence at points x_t [B, C, H, W], [B, 1, 1, 1]."""
        if self.config.divergence == "reverse-kl":
            return torch.ones_like(x_t[:, :1, :1, :1])
        logit = self.fake.logit(x_t, self.task.schedule.network_time(t), cond)
        ratio, low, high = logit.exp().clamp(*RATIOS), self.config.min_time, self.config.max_time
        place = ((t - low) / (high - low) * TIME_BINS).long().clamp(0, TIME_BINS - 1)
        sums = torch.zeros(2, TIME_BINS, device=ratio.device)
        sums.index_add_(1, place, torch.stack([ratio, torch.ones_like(ratio)]))
        h = WEIGHTS[self.config.divergence](ratio / (sums[0] / sums[1])[place])
        return (h / h.mean()).reshape(-1, 1, 1, 1)

    def fake_loss(
        self, x: Tensor, cond: Condition, batch: Batch, update: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The fake score's loss: denoising of samples x [B, C, H, W], and the head's loss.

        Args:
            update: the number of the student's last update.
        """
        assert batch.data is not None
        a = self.renoising(update)
        x_t, t = self.noised(x, batch, "fake", a=a)
        eps, kind = batch.normal("fake eps", x.shape[1:]), self.model.prediction_type
        target = getattr(of_pair(x, eps, t, self.task.schedule), kind)
        denoising = (getattr(self.model(x_t, t, cond), kind) - target).square().mean()
        metrics = {"denoising": denoising.detach()}
        if not self.config.fake_gan:
            return denoising, metrics
        real_t, t_real = self.noised(batch.data[0], batch, "real", a=a)
        on_real = self.fake.logit(real_t, self.task.schedule.network_time(t_real), batch.data[1])
        on_fake = self.fake.logit(x_t, self.task.schedule.network_time(t), cond)
        gan = (F.softplus(on_fake) + F.softplus(-on_real)).mean()
        return denoising + self.config.fake_gan * gan, metrics | {
            "real": on_real.detach().mean(),
            "fake": on_fake.detach().mean(),
        }


class StageOptions(OptimizerConfig):
    """Options of the distribution matching stage; `dmd_from` turns it on."""

    dmd_from: float | None = Field(None, ge=0, lt=1)
    """Fraction of the run after which the stage begins; none means never. Needs images."""
    dmd_weight: float = Field(1.0, ge=0, le=1e6)
    """Weight of distribution matching beside the trajectory regression."""
    dmd_every: int = Field(5, ge=1, le=100)
    """Updates of the fake score for each update of the student."""
    dmd_fake_lr: float = Field(1e-3, gt=0, le=1)
    """Peak learning rate of the fake score; its schedule spans the stage."""


class MatchingStage:
    """Distribution matching of a student's last x_0, which its own loss leaves in the carry.

    The fake score starts from the teacher's weights.
    """

    name = "fake_score"

    def __init__(self, config: Any, teacher: Guided, task: Problem, total_steps: int):
        self.start, self.every, self.weight = (
            round(config.dmd_from * total_steps),
            config.dmd_every,
            config.dmd_weight,
        )
        shared = config.model_dump(include={"weight_decay", "clip", "warmup"})
        self.matching = Matching(
            MatchingConfig(fake_lr=config.dmd_fake_lr, **shared),
            teacher,
            task,
            starts_as_teacher=True,
        )
        self.player = self.matching.player
        whole, before = cosine(config.warmup), config.dmd_from
        # The stage counts as the whole run.
        self.player.rate = lambda progress: whole((progress - before) / (1 - before))

    @staticmethod
    def student_updates(config: Any, total_steps: int) -> int:
        """The number of the student's optimizer steps in a run with this stage."""
        start = round(config.dmd_from * total_steps)
        return start + math.ceil((total_steps - start) / config.dmd_every)

    def student_update(self, step: int) -> int:
        return (step - self.start) // self.every

    def updates(self, step: int, loss: Loss) -> list[Update]:
        if (step - self.start) % self.every:
            return [Update(self.name, partial(self.fake_loss, loss), "alone")]
        return [
            Update("student", partial(self.student_loss, loss), "matching"),
            Update(self.name, partial(self.fake_loss, None)),
        ]

    def student_loss(self, loss: Loss, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`loss + weight L`."""
        assert batch.trajectory is not None
        own, metrics = loss(batch)
        matching, more = self.matching.student_loss(
            batch.carry["x_0"], batch.trajectory.cond, batch
        )
        return own + self.weight * matching, metrics | more | {"mse": own.detach()}

    def fake_loss(self, loss: Loss | None, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The fake score's loss on the x_0 in the carry.

        In a step without an update of the student, `loss` puts it there now.
        """
        assert batch.trajectory is not None
        if loss is not None:
            with torch.no_grad():
                loss(batch)
        return self.matching.fake_loss(batch.carry["x_0"].detach(), batch.trajectory.cond, batch)

    def sums(self) -> Sequence[Tensor]:
        return ()

    def end_step(self) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do: the stage has no state beyond the player."""
