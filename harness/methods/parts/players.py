"""Networks that are trained: their optimizers, moving averages and learning rates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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


@torch.no_grad()
def blend(average: nn.Module, module: nn.Module, share: float) -> None:
    """Gives a module's weights this share of an average; buffers are copied, shared ones stay."""
    pairs = zip(average.parameters(), module.parameters(), strict=True)
    own, theirs = zip(*(pair for pair in pairs if pair[0] is not pair[1]), strict=True)
    torch._foreach_lerp_(own, theirs, share)
    for mine, buffer in zip(average.buffers(), module.buffers(), strict=True):
        mine.copy_(buffer)


class EMA:
    """An exponential moving average of a module's weights.

    Args:
        module: the network to average; the average starts as a copy of it, and shares the
            weights that do not train.
        half_life: fraction of the run after which a weight's share has halved.
        total_steps: length of the run.
    """

    def __init__(self, module: nn.Module, half_life: float, total_steps: int):
        # Weights that do not train are equal for ever, so they are shared.
        frozen = {id(p): p for p in module.parameters() if not p.requires_grad}
        self.module = copy.deepcopy(module, frozen).requires_grad_(False).eval()
        self.half_life, self.decay = half_life, 0.5 ** (1 / (half_life * max(total_steps, 1)))

    def update(self, module: nn.Module) -> None:
        """`average = decay average + (1 - decay) weights`; buffers are copied."""
        blend(self.module, module, 1 - self.decay)

    @property
    def initial_weight(self) -> float:
        """The share of the initial weights in the average at the end of the run."""
        return 0.5 ** (1 / self.half_life)


@dataclass
class Player:
    """A network that is trained.

    Attributes:
        module, optimizer: the network, and the optimizer of those of its weights that train.
        clip: the norm to which the gradient is clipped, or None.
        ema: the moving average of the weights, or None.
        rate: the factor of the learning rate over the run.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    clip: float | None = 1.0
    ema: EMA | None = None
    rate: Rate = constant

    @property
    def trained(self) -> list[nn.Parameter]:
        """The weights that train: those of the optimizer, in its order."""
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors by "<quantity> <parameter>"; empty before its first step."""
        states = self.optimizer.state
        return {
            f"{quantity} {name}": value
            for name, parameter in self.module.named_parameters()
            for quantity, value in states.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Restores what `optimizer_state` gave for a player of equal parameters; rates stay.

        Raises KeyError for a parameter without a state.
        """
        named: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            quantity, _, name = key.partition(" ")
            named.setdefault(name, {})[quantity] = value
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        plain = self.optimizer.state_dict()
        plain["state"] = {i: named[names[p]] for i, p in enumerate(self.trained)}
        self.optimizer.load_state_dict(plain)
