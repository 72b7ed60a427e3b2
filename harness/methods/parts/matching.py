"""Distribution matching (DMD2, Yin et al. 2024, arXiv 2405.14867): a fake score, and the two losses that it takes.

A sample x of the student is noised to x_t and moved along the difference of two denoisers, the guided teacher's and that of a fake
score, which is trained on the student's own samples:

    grad = (x_fake(x_t) - x_real(x_t)) / mean |x - x_real|,    L = 1/2 |x - sg(x - grad)|^2
    L_fake = (SNR + 1 / sd^2) |x_fake(x_t) - x|^2

A head on the fake score's features tells real images from samples, both noised: `softplus(D(fake)) + softplus(-D(real))` for the fake
score's player, `softplus(-D(fake))` for the student. `dmd2.py` trains a student by these losses alone; with `dmd_from` they finish a
student of trajectories (`step_distillation.py`), on its last state.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Denoiser, Guided, expand_to
from harness.errors import UsageError
from harness.methods.base import Batch, Loss, Problem, Update
from harness.methods.parts.options import OptimizerConfig
from harness.methods.parts.players import Player, cosine
from harness.networks.dit import DiT


class MatchingConfig(OptimizerConfig):
    """Options of distribution matching."""

    fake_lr: float = Field(1e-3, gt=0, le=1)
    """Peak learning rate of the fake score and of its head."""
    student_every: int = Field(5, ge=1, le=100)
    """Steps of the fake score for each of the student's."""
    student_gan: float = Field(3e-3, ge=0, le=1e3)
    """Weight of the GAN in the student's loss; 0 in both leaves it out."""
    fake_gan: float = Field(1e-2, ge=0, le=1e3)
    """Weight of the GAN in the fake score's loss."""
    min_time: float = Field(0.02, gt=0, lt=1)
    """Smallest timestep at which scores are compared."""
    max_time: float = Field(0.98, gt=0, lt=1)
    """Largest timestep at which scores are compared."""

    def check_matching(self) -> None:
        """Raises UsageError for options that contradict each other."""
        if self.min_time >= self.max_time:
            raise UsageError(f"min_time is {self.min_time:g}, but must be below max_time, which is {self.max_time:g}")
        if bool(self.student_gan) != bool(self.fake_gan):
            raise UsageError("student_gan and fake_gan are the two sides of one GAN: give both, or 0 for both")


class FakeScore(nn.Module):
    """A network and, on the mean of the tokens in its middle, a head that tells real images from samples."""

    def __init__(self, network: DiT):
        super().__init__()
        width = network.final_layer.linear.in_features
        self.network = network
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def logit(self, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        """[B]: positive for real images."""
        middle = (self.network.depth + 1) // 2
        for depth, h in enumerate(self.network.block_outputs(x_t, self.network.conditioning(time, cond), cond), 1):
            if depth == middle:
                return self.head(h.mean(1)).squeeze(-1).float()
        raise AssertionError


class Matching:
    """A fake score, its player, and both losses.

    Args:
        starts_as_teacher: whether the fake score starts with the teacher's weights; from random ones it predicts v.
    """

    def __init__(self, config: MatchingConfig, teacher: Guided, task: Problem, starts_as_teacher: bool):
        self.config, self.teacher, self.task = config, teacher, task
        network = DiT(**task.network_options)
        if starts_as_teacher:
            network.load_teacher(teacher.denoiser.network.state_dict())
        self.fake = FakeScore(network)
        optimizer = torch.optim.AdamW(self.fake.parameters(), config.fake_lr, betas=(0.9, 0.999), weight_decay=config.weight_decay)
        self.player = Player(self.fake, optimizer, config.clip, rate=cosine(config.warmup))
        self.model = Denoiser(network, task.schedule, task.prediction_type if starts_as_teacher else "v")

    def noised(self, x: Tensor, batch: Batch, name: str) -> tuple[Tensor, Tensor]:
        """Images x [B, C, H, W] at random levels, and those [B]."""
        low, high = self.config.min_time, self.config.max_time
        t = low + batch.uniform(f"{name} t") * (high - low)
        alpha, sigma = (expand_to(c, x) for c in self.task.schedule.alpha_sigma(t))
        return alpha * x + sigma * batch.normal(f"{name} eps", x.shape[1:]), t

    def student_loss(self, x: Tensor, cond: Condition, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of samples x [B, C, H, W] through which gradients flow."""
        x_t, t = self.noised(x, batch, "student")
        with torch.no_grad():
            real, fake = self.teacher(x_t, t, cond).x_0, self.model(x_t, t, cond).x_0
            scale = (x - real).abs().flatten(1).mean(1).clamp(min=1e-4).reshape(-1, 1, 1, 1)
            gradient = (fake - real) / scale
        matching = 0.5 * (x - (x - gradient).detach()).square().mean()
        metrics = {"gradient": gradient.square().mean()}
        if not self.config.student_gan:
            return matching, metrics
        gan = F.softplus(-self.fake.logit(x_t, self.task.schedule.network_time(t), cond)).mean()
        return matching + self.config.student_gan * gan, metrics | {"gan": gan.detach()}

    def fake_loss(self, x: Tensor, cond: Condition, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Denoising of samples x [B, C, H, W], and the head's loss on them and the batch's real images."""
        assert batch.data is not None
        x_t, t = self.noised(x, batch, "fake")
        alpha, sigma = self.task.schedule.alpha_sigma(t)
        weight = expand_to((alpha / sigma) ** 2 + 1 / self.task.data_std**2, x)
        denoising = (weight * (self.model(x_t, t, cond).x_0 - x).square()).mean()
        metrics = {"denoising": denoising.detach()}
        if not self.config.fake_gan:
            return denoising, metrics
        real_t, t_real = self.noised(batch.data[0], batch, "real")
        on_real = self.fake.logit(real_t, self.task.schedule.network_time(t_real), batch.data[1])
        on_fake = self.fake.logit(x_t, self.task.schedule.network_time(t), cond)
        gan = (F.softplus(on_fake) + F.softplus(-on_real)).mean()
        return denoising + self.config.fake_gan * gan, metrics | {"real": on_real.detach().mean(), "fake": on_fake.detach().mean()}


class StageOptions(OptimizerConfig):
    """Options of the stage of distribution matching, which `dmd_from` turns on."""

    dmd_from: float | None = Field(None, ge=0, lt=1)
    """Fraction of the run after which distribution matching begins; none means never. It needs real images."""
    dmd_weight: float = Field(1.0, ge=0, le=1e6)
    """Its weight beside the regression of the trajectory."""
    dmd_every: int = Field(5, ge=1, le=100)
    """Steps of the fake score for each of the student's."""
    dmd_fake_lr: float = Field(1e-3, gt=0, le=1)
    """Peak learning rate of the fake score, whose schedule is that of the stage."""


class MatchingStage:
    """Distribution matching of a student's last x_0, which its own loss leaves in the carry; the fake score starts as the teacher."""

    name = "fake_score"

    def __init__(self, config: Any, teacher: Guided, task: Problem, total_steps: int):
        self.start, self.every, self.weight = round(config.dmd_from * total_steps), config.dmd_every, config.dmd_weight
        shared = config.model_dump(include={"weight_decay", "clip", "warmup"})
        self.matching = Matching(MatchingConfig(fake_lr=config.dmd_fake_lr, **shared), teacher, task, starts_as_teacher=True)
        self.player = self.matching.player
        whole, before = cosine(config.warmup), config.dmd_from
        self.player.rate = lambda progress: whole((progress - before) / (1 - before))  # of the stage, as if it were the run

    @staticmethod
    def student_updates(config: Any, total_steps: int) -> int:
        """How many optimizer steps of the student a run with this stage has."""
        start = round(config.dmd_from * total_steps)
        return start + math.ceil((total_steps - start) / config.dmd_every)

    def student_update(self, step: int) -> int:
        return (step - self.start) // self.every

    def updates(self, step: int, loss: Loss) -> list[Update]:
        if (step - self.start) % self.every:
            return [Update(self.name, partial(self.fake_loss, loss), "alone")]
        return [Update("student", partial(self.student_loss, loss), "matching"), Update(self.name, partial(self.fake_loss, None))]

    def student_loss(self, loss: Loss, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`loss + weight L`."""
        assert batch.trajectory is not None
        own, metrics = loss(batch)
        matching, more = self.matching.student_loss(batch.carry["x_0"], batch.trajectory.cond, batch)
        return own + self.weight * matching, metrics | more | {"mse": own.detach()}

    def fake_loss(self, loss: Loss | None, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The fake score's, on what the student's step left, or in a step without one on what `loss` leaves now."""
        assert batch.trajectory is not None
        if loss is not None:
            with torch.no_grad():
                loss(batch)
        return self.matching.fake_loss(batch.carry["x_0"].detach(), batch.trajectory.cond, batch)

    def end_step(self) -> None:
        """Nothing moves by itself."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is nothing beyond the player."""
