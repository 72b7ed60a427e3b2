"""The GAN stage of ARD (arXiv 2504.11295): a discriminator on a frozen teacher's features.

The regression ends at `gan_from`, with its whole learning rate schedule. From there on the finished
student goes on with its optimizer at the constant rate `gan_student_lr`, and its loss is
`MSE + lambda GAN`. The discriminator has one head on each block of the teacher
(`networks/discriminator.py`). Under the hinge loss it compares the student's x_0 with real images,
both noised.

    lambda = gan_weight clamp(|grad MSE| / (|grad GAN| + 1e-4), 0, 1e4)

with gradients of the last layer's weight (VQGAN, arXiv 2012.09841, eq. 7). lambda is 0 in the
stage's first `gan_warmup_steps` steps, in which the heads warm up. With `gan_from: 0` and
`init_from: RUN` the student and its optimizer come from a run of their own, as in the paper.

The heads' gradients are not clipped, and a forward pass changes none of their buffers: batch norm
has no running statistics, and the spectral norm moves once a step.

The released code lacks its GAN losses. These choices are ours:

- The timestep at the discriminator's input is uniform up to `gan_max_time`.
- Logits are averaged over heads and tokens.
- Virtual batches of the student's samples hold no other images, in both losses.
- The discriminator sees the last x_0 alone.
- lambda comes from the last step's gradients, averaged over the whole batch (`gan_lag` 1), so
  micro-batches equal a large batch. `gan_lag` 0 is the paper's and needs the whole batch at once.
  Under `step_counts` the last step had another number of sampling steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Guided, expand_to
from harness.diffusion.schedules import NUM_LEVELS
from harness.methods.base import Batch, Loss, Problem, Update
from harness.methods.parts.options import OptimizerConfig
from harness.methods.parts.players import Player, cosine
from harness.networks.backbones import Backbone
from harness.networks.discriminator import Heads


class GANOptions(OptimizerConfig):
    """Options of the GAN stage; `gan_from` turns it on."""

    gan_from: float | None = Field(None, ge=0, lt=1)
    """Fraction of the run at which the student is finished and the GAN stage begins; none means
    never. 0 with init_from goes on with that run's student and optimizer. Needs images."""
    gan_student_lr: float = Field(3e-5, gt=0, le=1)
    """Constant learning rate of the student in the stage (paper: 1e-4, at which heads that have
    trained for 100 steps only lead it astray)."""
    gan_lr: float = Field(3e-4, gt=0, le=1)
    """Constant learning rate of the discriminator's heads (paper: 1e-3, 10 times the student's)."""
    gan_warmup_steps: int = Field(100, ge=0, le=10**7)
    """First steps of the stage, in which the GAN has no weight (paper: 3,000 of 40,000)."""
    gan_weight: float = Field(10.0, ge=0, le=1e6)
    """Factor of the ratio of gradient norms (paper: 10)."""
    gan_max_time: float = Field(0.25, gt=0, le=1)
    """Largest timestep of the noised discriminator input."""
    gan_lag: int = Field(1, ge=0, le=1)
    """Source of the weight: 1 for the step before, 0 for the same micro-batch."""
    gan_virtual_batch: int = Field(8, ge=1, le=4096)
    """Number of samples that the heads normalise together."""

    @property
    def sample_group(self) -> int:
        """The virtual batch, if the stage is on."""
        return 1 if self.gan_from is None else self.gan_virtual_batch

    @property
    def whole_batch(self) -> bool:
        """True under `gan_lag` 0: a ratio of norms does not average over micro-batches."""
        return self.gan_from is not None and self.gan_lag == 0

    @property
    def reads_activations(self) -> bool:
        """True: the weight needs gradients at the last layer's output."""
        return self.gan_from is not None


@dataclass
class LayerCall:
    """Input [..., d] and output [..., m] of the last call of a linear layer."""

    inputs: Tensor | None = None
    output: Tensor | None = None

    def weight_gradient(self, of_output: Tensor) -> Tensor:
        """The gradient of the weight [m, d], from the gradient of the output [..., m]."""
        assert self.inputs is not None
        return of_output.flatten(0, -2).float().t() @ self.inputs.detach().flatten(0, -2).float()


@contextmanager
def recorded_call(layer: nn.Linear) -> Iterator[LayerCall]:
    """Records the last input and output of a layer inside the block."""
    call = LayerCall()

    def note(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        call.inputs, call.output = args[0], output

    handle = layer.register_forward_hook(note)
    try:
        yield call
    finally:
        handle.remove()


class Critic:
    """A discriminator on the tokens of a frozen teacher's blocks, and its player.

    Args:
        lr: learning rate of the heads, which are not clipped.
        virtual_batch: number of samples that the heads normalise together.
        max_time: largest timestep of the noised input.
    """

    def __init__(
        self,
        teacher: Guided,
        task: Problem,
        lr: float,
        virtual_batch: int,
        max_time: float,
    ):
        network = teacher.denoiser.network
        assert isinstance(network, Backbone)
        self.network, self.schedule, self.max_time = network, task.schedule, max_time
        self.heads = Heads(network.depth, network.width, virtual_batch)
        optimizer = torch.optim.AdamW(
            self.heads.parameters(), lr, betas=(0.9, 0.999), weight_decay=0.0
        )
        self.player = Player(self.heads, optimizer, clip=None)

    def logits(self, x_0: Tensor, cond: Condition, batch: Batch, name: str) -> Tensor:
        """The heads' logits [heads, B, T] for images x_0 [B, C, H, W] after keyed noising."""
        t = (batch.uniform(f"{name} t") * self.max_time).clamp(min=1 / NUM_LEVELS)
        alpha, sigma = (expand_to(c, x_0) for c in self.schedule.alpha_sigma(t))
        x_t = alpha * x_0 + sigma * batch.normal(f"{name} eps", x_0.shape[1:])
        tokens, c = self.network.features(x_t, self.schedule.network_time(t), cond)
        return torch.stack([head(h, c) for head, h in zip(self.heads, tokens, strict=True)])

    def hinge(
        self, real: tuple[Tensor, Condition], fake: tuple[Tensor, Condition], batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`max(0, 1 - D(real)) + max(0, 1 + D(fake))` for images with conditions."""
        on_real, on_fake = self.logits(*real, batch, "real"), self.logits(*fake, batch, "student")
        loss = (1 - on_real).relu().mean() + (1 + on_fake).relu().mean()
        return loss, {"real": on_real.detach().mean(), "fake": on_fake.detach().mean()}


class Adversary(Critic):
    """The GAN stage: the discriminator's player, and both losses on the student's last x_0.

    The student's own loss leaves this x_0 in the batch's carry.

    Args:
        last_layer: the layer whose weight gradients balance the two losses.
        total_steps: length of the run.
    """

    name = "discriminator"

    def __init__(
        self,
        config: GANOptions,
        teacher: Guided,
        task: Problem,
        last_layer: nn.Linear,
        total_steps: int,
    ):
        assert config.gan_from is not None
        super().__init__(
            teacher, task, config.gan_lr, config.gan_virtual_batch, config.gan_max_time
        )
        self.config, self.last_layer = config, last_layer
        self.total_steps, self.start = total_steps, round(config.gan_from * total_steps)
        self.warm = self.start + config.gan_warmup_steps
        self.weight = 0.0
        # Sums over micro-batches.
        self.gradients, self.samples = torch.zeros(2, *last_layer.weight.shape), torch.zeros(())

    def student_rate(self, progress: float) -> float:
        """The factor of the student's rate: its whole schedule up to the stage, then a constant."""
        steps = round(progress * self.total_steps)
        if steps <= self.start:
            return cosine(self.config.warmup)(steps / self.start)
        return self.config.gan_student_lr / self.config.lr

    def student_update(self, step: int) -> int:
        return step

    def updates(self, step: int, loss: Loss) -> list[Update]:
        student = (
            Update("student", loss)
            if step < self.warm
            else Update("student", partial(self.student_loss, loss), "gan")
        )
        return [student, Update(self.name, self.discriminator_loss)]

    def student_loss(self, loss: Loss, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`MSE + lambda GAN`.

        Both gradients are taken at the last layer's output. The GAN's enters the loss as a product
        with that output, so the discriminator needs one backward pass.
        """
        assert batch.trajectory is not None
        with recorded_call(self.last_layer) as call:
            mse, metrics = loss(batch)
        x_0, cond = batch.carry["x_0"], batch.trajectory.cond
        output = call.output
        assert output is not None
        gan = -self.logits(x_0, cond, batch, "student").mean()
        of_mse, of_gan = (
            torch.autograd.grad(loss, output, retain_graph=True)[0] for loss in (mse, gan)
        )
        found = torch.stack([call.weight_gradient(of_mse), call.weight_gradient(of_gan)])
        self.gradients, self.samples = (
            self.gradients.to(found.device) + len(x_0) * found,
            self.samples + len(x_0),
        )
        weight = self.weight if self.config.gan_lag else self.balance(found)
        product = (of_gan * output).sum()
        gan = gan.detach() + product - product.detach()
        metrics |= {"gan": gan.detach(), "gan_weight": torch.tensor(weight), "mse": mse.detach()}
        return mse + weight * gan, metrics

    def discriminator_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The hinge loss on the x_0 in the carry."""
        assert batch.data is not None
        assert batch.trajectory is not None
        return self.hinge(batch.data, (batch.carry["x_0"].detach(), batch.trajectory.cond), batch)

    def balance(self, gradients: Tensor) -> float:
        """lambda, from the gradients [2, ...] of the last layer's weight."""
        mse, gan = (float(norm) for norm in gradients.flatten(1).norm(dim=1))
        return self.config.gan_weight * min(mse / (gan + 1e-4), 1e4)

    def sums(self) -> Sequence[Tensor]:
        return [self.gradients, self.samples]

    def end_step(self) -> None:
        """Sets lambda for the next step and updates the spectral norms."""
        self.heads.power_iteration()
        if self.samples:
            self.weight = self.balance(self.gradients / self.samples)
            self.gradients, self.samples = torch.zeros_like(self.gradients), torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        return {
            "gan_weight": self.weight,
            "gan_gradients": self.gradients,
            "gan_samples": self.samples,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight, self.gradients, self.samples = (
            state["gan_weight"],
            state["gan_gradients"],
            state["gan_samples"],
        )
