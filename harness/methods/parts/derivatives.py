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


def with_derivative(
    how: Derivative,
    function: Callable[..., Tensor],
    points: tuple[Tensor, ...],
    tangents: tuple[Tensor, ...],
    centre: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """The value of a function and its derivative along the tangents, in float32.

    Gradients flow through the value alone.

    Args:
        centre: the points of a difference, where those around `points` are outside of the
            function's domain.
    """
    if how == "jvp":
        value, derivative = jvp(function, points, tangents)
        return value, derivative.detach()
    with torch.autocast(points[0].device.type, enabled=False):
        with torch.no_grad():
            ahead, behind = (
                function(
                    *(x + side * STEP * v for x, v in zip(centre or points, tangents, strict=True))
                )
                for side in (1, -1)
            )
        return function(*points), (ahead - behind) / (2 * STEP)
