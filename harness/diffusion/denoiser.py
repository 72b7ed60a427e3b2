"""A network seen through its noise schedule, and guidance.

Everybody above sees `Prediction(x_0, eps, v)`, each derived straight from the network's own output, in float32 or,
for images in float64, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.diffusion.schedules import Schedule

PredictionType = Literal["eps", "x_0", "v"]


@dataclass(frozen=True)
class Prediction:
    """Clean image, noise and velocity (`Schedule.v_weights`) that a denoiser predicts for x_t, [B, C, H, W] each."""

    x_0: Tensor
    eps: Tensor
    v: Tensor


class Model(Protocol):
    """What a solver asks: the prediction for x_t [B, C, H, W] at timestep t (0-d or [B], in [0, 1])."""

    schedule: Schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction: ...


def full_precision(x: Tensor) -> torch.dtype:
    """The type to compute with x in: float64 if x has it, otherwise float32."""
    return torch.promote_types(x.dtype, torch.float32)


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient, 0-d or [B], on x's device, shaped to multiply x [B, ...] in full precision."""
    return coefficient.to(device=x.device, dtype=full_precision(x)).reshape(-1, *[1] * (x.dim() - 1))


def predict(output: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule, prediction_type: PredictionType) -> Prediction:
    """Turns a network's output into a `Prediction`.

    Args:
        output, x_t: [B, C, H, W].
        t: 0-d or [B]. x_0 needs alpha_t > 0 from "eps" and "v", eps needs sigma_t > 0 from "x_0": at t = 0 it is 0.
        prediction_type: what `output` is.
    """
    x, out = (value.to(full_precision(x_t)) for value in (x_t, output))
    alpha, sigma = (like(c, x) for c in schedule.alpha_sigma(t))
    a, b = (like(c, x) for c in schedule.v_weights(t))
    if prediction_type == "eps":
        x_0 = (x - sigma * out) / alpha
        return Prediction(x_0, out, a * x_0 + b * out)
    if prediction_type == "x_0":
        eps = torch.where(sigma > 0, (x - alpha * out) / sigma.clamp(min=1e-12), torch.zeros_like(x))
        return Prediction(out, eps, a * out + b * eps)
    return Prediction(b * x - sigma * out, alpha * out - a * x, out)


class Denoiser(nn.Module):
    """A network and the schedule it was trained under.

    Args:
        network: called as network(x [B, C, H, W], network time [B], conditions); of its output the first C channels count.
    """

    def __init__(self, network: nn.Module, schedule: Schedule, prediction_type: PredictionType = "eps"):
        super().__init__()
        self.network, self.schedule, self.prediction_type = network, schedule, prediction_type

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        time = self.schedule.network_time(t).to(x_t.device).expand(len(x_t))
        output = self.network(x_t, time, cond)[:, : x_t.shape[1]]
        return predict(output, x_t, t, self.schedule, self.prediction_type)


class Guided(nn.Module):
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6): `eps_w = eps_null + w (eps_cond - eps_null)`.

    Both evaluations run as one batch; at scale 1 there is only the conditional one.

    Args:
        denoiser: what is guided, in the terms of its own output, which are linear in eps.
        scale: w, one number or one for each sample [B].
        null: the null condition, a batch of one.
        channels: how many leading channels are guided; None is all, 3 is what DiT's published numbers used.
    """

    def __init__(self, denoiser: Denoiser, scale: float | Tensor, null: Condition, channels: int | None = None):
        super().__init__()
        self.denoiser, self.scale, self.null, self.channels = denoiser, scale, null, channels
        self.schedule = denoiser.schedule

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        if not isinstance(self.scale, Tensor) and self.scale == 1.0:
            return self.denoiser(x_t, t, cond)
        both = cond.repeat(2).replaced(torch.arange(2 * len(x_t), device=x_t.device) >= len(x_t), self.null)
        t_both = t if t.dim() == 0 else t.repeat(2)
        kind = self.denoiser.prediction_type
        with_cond, without = getattr(self.denoiser(x_t.repeat(2, 1, 1, 1), t_both, both), kind).chunk(2)
        scale = like(self.scale, without) if isinstance(self.scale, Tensor) else self.scale
        guided = without + scale * (with_cond - without)
        if self.channels is not None:
            guided = torch.cat([guided[:, : self.channels], with_cond[:, self.channels :]], 1)
        return predict(guided, x_t, t, self.schedule, kind)

    def through(self, network: nn.Module) -> Guided:
        """The same teacher with another network in the place of its own."""
        return Guided(Denoiser(network, self.schedule, self.denoiser.prediction_type), self.scale, self.null, self.channels)

    def at(self, scale: float | Tensor) -> Guided:
        """The same teacher at another scale."""
        return Guided(self.denoiser, scale, self.null, self.channels)
