"""Denoisers: a network under its noise schedule, and classifier-free guidance.

Callers see `Prediction(x_0, eps, v)`, each computed from the network's own output, in float32;
images in float64 stay in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.diffusion.schedules import Schedule

PredictionType = Literal["eps", "x_0", "v"]


@dataclass(frozen=True)
class Prediction:
    """Clean image, noise and velocity (`Schedule.v_weights`) of x_t, [B, C, H, W] each."""

    x_0: Tensor
    eps: Tensor
    v: Tensor


class Model(Protocol):
    """A function from x_t [B, C, H, W] at timestep t, 0-d or [B] in [0, 1], to its prediction."""

    schedule: Schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction: ...


def full_precision(x: Tensor) -> torch.dtype:
    """The type to compute with x in: float64 if x has it, otherwise float32."""
    return torch.promote_types(x.dtype, torch.float32)


def on_device(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device.

    A single number from the CPU is written there, not copied. A copy waits for the device, and
    cannot be part of a CUDA graph.
    """
    dtype = dtype or x.dtype
    if x.dim() == 0 and x.device.type == "cpu" != device.type:
        return torch.full((), x.item(), dtype=dtype, device=device)
    return x.to(device=device, dtype=dtype)


def expand_to(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient, 0-d or [B], on x's device, shaped to multiply x [B, ...] in full precision."""
    return on_device(coefficient, x.device, full_precision(x)).reshape(-1, *[1] * (x.dim() - 1))


def predict(
    output: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule, prediction_type: PredictionType
) -> Prediction:
    """The prediction that a network's output stands for.

    Args:
        output, x_t: [B, C, H, W].
        t: 0-d or [B]. Types "eps" and "v" need alpha_t > 0; under "x_0", eps is 0 at t = 0.
        prediction_type: the meaning of `output`.
    """
    x, out = (value.to(full_precision(x_t)) for value in (x_t, output))
    alpha, sigma = (expand_to(c, x) for c in schedule.alpha_sigma(t))
    a, b = (expand_to(c, x) for c in schedule.v_weights(t))
    if prediction_type == "eps":
        x_0 = (x - sigma * out) / alpha
        return Prediction(x_0, out, a * x_0 + b * out)
    if prediction_type == "x_0":
        eps = torch.where(
            sigma > 0, (x - alpha * out) / sigma.clamp(min=1e-12), torch.zeros_like(x)
        )
        return Prediction(out, eps, a * out + b * eps)
    return Prediction(b * x - sigma * out, alpha * out - a * x, out)


def of_pair(x_0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Prediction:
    """The prediction that is exact for a known pair x_0 and eps [B, C, H, W] at t, 0-d or [B]."""
    a, b = (expand_to(c, x_0) for c in schedule.v_weights(t))
    return Prediction(x_0, eps, a * x_0 + b * eps)


class Denoiser(nn.Module):
    """A network under the schedule it was trained with.

    Args:
        network: called as network(x [B, C, H, W], network time [B], conditions). Only the first C
            channels of its output are read.
    """

    def __init__(
        self, network: nn.Module, schedule: Schedule, prediction_type: PredictionType = "eps"
    ):
        super().__init__()
        self.network, self.schedule, self.prediction_type = network, schedule, prediction_type

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        time = on_device(self.schedule.network_time(t), x_t.device).expand(len(x_t))
        output = self.network(x_t, time, cond)[:, : x_t.shape[1]]
        return predict(output, x_t, t, self.schedule, self.prediction_type)


def patch_norms(x: Tensor, side: int) -> Tensor:
    """At each pixel the norm of its square of pixels over all channels, [B, 1, H, W].

    Args:
        x: [B, C, H, W], where `side` divides H and W.
    """
    squares = side**2 * F.avg_pool2d(x.square().sum(1, keepdim=True), side)
    return squares.sqrt().repeat_interleave(side, 2).repeat_interleave(side, 3)


class Guided(nn.Module):
    """Classifier-free guidance, `eps_w = eps_null + w (eps_cond - eps_null)`.

    Source: Ho & Salimans 2022, arXiv 2207.12598, eq. 6.

    Both evaluations run as one batch; scale 1 needs only the conditional one. Guidance acts on
    the denoiser's own output, which is linear in eps.

    Args:
        denoiser: the denoiser to guide.
        scale: w, one number or one for each sample [B].
        null: the null condition, a batch of one.
        channels: number of leading channels to guide; None is all. DiT's published numbers use 3.
        norm_patch: side of the squares whose norm guidance leaves at the conditional one's; None
            leaves norms free. Qwen-Image's pipeline has 2.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scale: float | Tensor,
        null: Condition,
        channels: int | None = None,
        norm_patch: int | None = None,
    ):
        super().__init__()
        self.denoiser, self.scale, self.null = denoiser, scale, null
        self.channels, self.norm_patch = channels, norm_patch
        self.schedule = denoiser.schedule
        self._null_on = dict[torch.device, Condition]()

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        if self.plain:
            return self.denoiser(x_t, t, cond)
        guided, _ = self.outputs(x_t, t, cond)
        return predict(guided, x_t, t, self.schedule, self.denoiser.prediction_type)

    @property
    def plain(self) -> bool:
        """Whether the scale is 1, so that guidance changes nothing."""
        return not isinstance(self.scale, Tensor) and self.scale == 1.0

    def change(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """What guidance adds to the conditional x_0, `(w - 1) (x_0 - x_0,null)`, [B, C, H, W]."""
        kind = self.denoiser.prediction_type
        guided, alone = (
            predict(output, x_t, t, self.schedule, kind).x_0
            for output in self.outputs(x_t, t, cond)
        )
        return guided - alone

    def outputs(self, x_t: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """The guided output of the denoiser, and the conditional one, [B, C, H, W] each."""
        both = cond.once(self.null, lambda: self.both(cond, x_t))
        both = both.with_scalars(**{name: x.repeat(2) for name, x in cond.scalars.items()})
        t_both = t if t.dim() == 0 else t.repeat(2)
        kind = self.denoiser.prediction_type
        with_cond, without = getattr(
            self.denoiser(x_t.repeat(2, 1, 1, 1), t_both, both), kind
        ).chunk(2)
        scale = expand_to(self.scale, without) if isinstance(self.scale, Tensor) else self.scale
        guided = without + scale * (with_cond - without)
        if self.channels is not None:
            guided = torch.cat([guided[:, : self.channels], with_cond[:, self.channels :]], 1)
        if (side := self.norm_patch) is not None:
            guided = guided * (patch_norms(with_cond, side) / patch_norms(guided, side))
        return guided, with_cond

    def both(self, cond: Condition, x_t: Tensor) -> Condition:
        """The conditions of the samples x_t [B, ...], then as many null conditions: 2 B."""
        second = torch.arange(2 * len(x_t), device=x_t.device) >= len(x_t)
        if x_t.device not in self._null_on:  # copied once, since a copy waits for the device
            self._null_on[x_t.device] = self.null.to(x_t.device)
        return cond.repeat(2).replaced(second, self._null_on[x_t.device])

    def with_network(self, network: nn.Module) -> Guided:
        """The same teacher with another network."""
        denoiser = Denoiser(network, self.schedule, self.denoiser.prediction_type)
        return Guided(denoiser, self.scale, self.null, self.channels, self.norm_patch)

    def at(self, scale: float | Tensor) -> Guided:
        """The same teacher at another guidance scale."""
        return Guided(self.denoiser, scale, self.null, self.channels, self.norm_patch)
