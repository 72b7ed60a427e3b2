"""Networks that are trained: their optimizers, moving averages and learning rates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Rate = Callable[[float], float]
"""From the fraction of the run that is done, in (0, 1], to the factor of the learning rate."""


def cosine(warmup: float) -> Rate:
    """A linear rise over the fraction `warmup` of the run, then a cosine down to 0."""

    def factor(progress: float) -> float:
        if progress < warmup:
            return progress / warmup
        return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))

    return factor


def constant(progress: float) -> float:
    """The factor 1 throughout the run."""
    return 1.0


class EMA:
    """An exponential moving average of a module's weights.

    Args:
        module: the network to average; the average starts as a copy of it.
        half_life: fraction of the run after which a weight's share has halved.
        total_steps: length of the run.
    """

    def __init__(self, module: nn.Module, half_life: float, total_steps: int):
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.half_life, self.decay = half_life, 0.5 ** (1 / (half_life * max(total_steps, 1)))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """`average = decay average + (1 - decay) weights`; buffers are copied."""
        torch._foreach_lerp_(
            list(self.module.parameters()), list(module.parameters()), 1 - self.decay
        )
        for mine, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs)

    @property
    def initial_weight(self) -> float:
        """The share of the initial weights in the average at the end of the run."""
        return 0.5 ** (1 / self.half_life)


@dataclass
class Player:
    """A network that is trained.

    Attributes:
        module, optimizer: the network and the optimizer of its parameters.
        clip: the norm to which the gradient is clipped, or None.
        ema: the moving average of the weights, or None.
        rate: the factor of the learning rate over the run.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    clip: float | None = 1.0
    ema: EMA | None = None
    rate: Rate = constant
