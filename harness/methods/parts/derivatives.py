"""The derivative of a network along a direction: by forward mode, or by a central difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.diffusion.counting import jvp
from harness.methods.parts.student import StudentConfig

Derivative = Literal["jvp", "difference"]
STEP = 5e-4
"""Step h of a difference, in units of the tangents. Its error falls with h^2; float32's rises
with 1 / h."""


class DerivativeConfig(StudentConfig):
    """Options of methods whose target has a derivative of the student."""

    added = frozenset({"derivative"})
    derivative: Derivative = Field("jvp")
    """How the student's derivative is computed: exactly, by forward mode, or as a central
    difference, which runs with any attention kernel. Both take three forwards."""


class TangentConfig(DerivativeConfig):
    """Options of methods that normalise the derivative in their target and let it rise."""

    normalisation: float = Field(0.1, ge=0, le=1e6)
    """Constant c in g / (|g| + c)."""
    norm: Literal["l2", "rms"] = "l2"
    """The norm |g|: L2 over a sample, or this over sqrt(D)."""
    ramp_steps: int = Field(300, ge=0, le=10**8)
    """Steps in which r rises (paper: 10,000)."""

    def ramp(self, step: int) -> float:
        """The factor r of the derivative at a step, from 0 to 1."""
        return min(step / self.ramp_steps, 1.0) if self.ramp_steps else 1.0

    def normalised(self, g: Tensor) -> Tensor:
        """`g / (|g| + c)` of tangents g [B, C, H, W]."""
        norm = g.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) / (
            g[0].numel() ** 0.5 if self.norm == "rms" else 1.0
        )
        return g / (norm + self.normalisation)


def with_derivative(
    how: Derivative,
    function: Callable[..., Tensor],
    points: tuple[Tensor, ...],
    tangents: tuple[Tensor, ...],
    centre: tuple[Tensor, ...] | None = None,
    through: bool = False,
) -> tuple[Tensor, Tensor]:
    """The value of a function and its derivative along the tangents, in float32.

    Args:
        centre: the points of a difference, where those around `points` are outside of the
            function's domain.
        through: whether gradients flow through the derivative too. A difference then gives the
            mean of its two sides as the value, which saves a pass.
    """
    if how == "jvp":
        value, derivative = jvp(function, points, tangents)
        return value, derivative if through else derivative.detach()
    with torch.autocast(points[0].device.type, enabled=False):
        with torch.set_grad_enabled(through):
            ahead, behind = (
                function(
                    *(x + side * STEP * v for x, v in zip(centre or points, tangents, strict=True))
                )
                for side in (1, -1)
            )
        value = (ahead + behind) / 2 if through else function(*points)
        return value, (ahead - behind) / (2 * STEP)
