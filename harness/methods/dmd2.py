"""DMD2, improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867).

The student's sample x is noised to x_t and moved along the difference of two denoisers, the guided teacher's and that of a fake
score, which is trained on the student's own samples:

    grad = (x_fake(x_t) - x_real(x_t)) / mean |x - x_real|,    L = 1/2 |x - sg(x - grad)|^2
    L_fake = (SNR + 1 / sd^2) |x_fake(x_t) - x|^2

The fake score learns in every step, the student in every fifth (two time scales). A head on the fake score's features tells real
images from samples, both noised: `softplus(D(fake)) + softplus(-D(real))` for the fake score's player, `softplus(-D(fake))` for the
student. With several steps the student is trained where sampling takes it: its own samples, noised to the next level, without
gradients (backward simulation); the step of a batch goes round in turn.

Untrained, the student's first step is the unguided teacher's x_0-prediction. Exact: where the fake score equals the guided teacher
the gradient of distribution matching is 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from harness.conditions import Condition
from harness.denoiser import Denoiser, Guided, like
from harness.errors import UsageError
from harness.methods.base import METHODS, Batch, Player, Problem, Update, cosine
from harness.methods.student import DenoisingStudent, StudentConfig
from harness.networks.dit import DiT


class DMD2Config(StudentConfig):
    lr: float = Field(3e-4, gt=0, le=1)
    """Peak learning rate of the student's AdamW (the paper's 2e-6 is for hundreds of thousands of steps)."""
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


@METHODS.register("dmd2")
class DMD2(DenoisingStudent):
    """The student's distribution is moved towards the teacher's."""

    Config = DMD2Config
    reference: ClassVar = "Yin et al. 2024, arXiv 2405.14867, sec. 4; gradient: Yin et al. 2023, arXiv 2311.18828, eq. 7 and 8"

    @staticmethod
    def student_updates(config: Any, total_steps: int) -> int:
        return -(-total_steps // config.student_every)

    def __init__(self, config: DMD2Config, teacher: Guided | None, task: Problem, num_steps: int, total_steps: int):
        super().__init__(config, teacher, task, num_steps, total_steps)
        network = DiT(**task.network_options)
        if self.starts_as_teacher:
            network.load_teacher(self.teacher.denoiser.network.state_dict())
        fake = FakeScore(network)
        optimizer = torch.optim.AdamW(fake.parameters(), config.fake_lr, betas=(0.9, 0.999), weight_decay=config.weight_decay)
        self.players["fake_score"] = Player(fake, optimizer, config.clip, rate=cosine(config.warmup))
        self.fake, self.fake_model = fake, self.seen(network)

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        if config.min_time >= config.max_time:
            raise UsageError(f"min_time is {config.min_time:g}, but must be below max_time, which is {config.max_time:g}")
        if bool(config.student_gan) != bool(config.fake_gan):
            raise UsageError("student_gan and fake_gan are the two sides of one GAN: give both, or 0 for both")

    def updates(self, step: int) -> Iterable[Update]:
        every, steps = self.config.student_every, len(self.levels) - 1
        found = []
        if step % every == 0:
            place = step // every % steps
            found.append(Update("student", partial(self.loss_at, place=place), f"step {place}"))
        return [*found, Update("fake_score", partial(self.fake_loss, place=step % steps), f"step {step % steps}")]

    def generate(self, model: Denoiser, cond: Condition, batch: Batch, place: int, name: str) -> Tensor:
        """The student's x_0 at step `place`, at a point where its own sampling takes it; gradients flow through the last step."""
        device = batch.index.device
        levels = self.levels.to(device)
        x_t = batch.normal(f"{name} x_T", self.task.shape)
        with torch.no_grad():
            for i in range(place):
                x_0 = model(x_t, levels[i], cond).x_0
                x_t = self.noised(x_0, batch.normal(f"{name} step {i + 1}", self.task.shape), levels[i + 1])
        return model(x_t, levels[place], cond).x_0

    def compared(self, x: Tensor, batch: Batch, name: str) -> tuple[Tensor, Tensor]:
        """x noised to random levels, and those."""
        low, high = self.config.min_time, self.config.max_time
        t = low + batch.uniform(f"{name} t") * (high - low)
        return self.noised(x, batch.normal(f"{name} eps", x.shape[1:]), t), t

    def loss_at(self, batch: Batch, place: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's loss at one of its steps."""
        assert batch.data is not None
        cond = batch.data[1]
        x = self.generate(self.model, cond, batch, place, "student")
        x_t, t = self.compared(x, batch, "student")
        with torch.no_grad():
            real, fake = self.teacher(x_t, t, cond).x_0, self.fake_model(x_t, t, cond).x_0
            scale = (x - real).abs().flatten(1).mean(1).clamp(min=1e-4).reshape(-1, 1, 1, 1)
            gradient = (fake - real) / scale
        matching = 0.5 * (x - (x - gradient).detach()).square().mean()
        metrics = {"gradient": gradient.square().mean()}
        if not self.config.student_gan:
            return matching, metrics
        gan = F.softplus(-self.fake.logit(x_t, self.schedule.network_time(t), cond)).mean()
        return matching + self.config.student_gan * gan, metrics | {"gan": gan.detach()}

    def fake_loss(self, batch: Batch, place: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Denoising of the student's samples, and its head's loss."""
        assert batch.data is not None
        x_0, cond = batch.data
        with torch.no_grad():
            x = self.generate(self.model, cond, batch, place, "fake")
        x_t, t = self.compared(x, batch, "fake")
        alpha, sigma = self.schedule.alpha_sigma(t)
        weight = like((alpha / sigma) ** 2 + 1 / self.task.data_std**2, x)
        denoising = (weight * (self.fake_model(x_t, t, cond).x_0 - x).square()).mean()
        metrics = {"denoising": denoising.detach()}
        if not self.config.fake_gan:
            return denoising, metrics
        real_t, t_real = self.compared(x_0, batch, "real")
        on_real = self.fake.logit(real_t, self.schedule.network_time(t_real), cond)
        on_fake = self.fake.logit(x_t, self.schedule.network_time(t), cond)
        gan = (F.softplus(on_fake) + F.softplus(-on_real)).mean()
        return denoising + self.config.fake_gan * gan, metrics | {"real": on_real.detach().mean(), "fake": on_fake.detach().mean()}
