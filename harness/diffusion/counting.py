"""FLOP counts of executed code, and forward-mode derivatives, which count as three forwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of the matrix products, convolutions and attentions of `run()`, backward included.

    Attention runs under the MATH backend: torch 2.13 counts the fused one on the CPU as 0.
    """
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton, which takes long

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        run()
    return counted.get_total_flops()


def jvp(
    function: Callable[..., Tensor], points: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The value of a function and its derivative along the tangents, by forward mode.

    It runs in float32 without fused attention. Gradients flow through the value as usual.
    A FLOP count charges three forwards, which is what forward mode executes: each product of the
    function has two more in its derivative.
    """
    with (
        torch.autocast(points[0].device.type, enabled=False),
        sdpa_kernel(SDPBackend.MATH),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of torch.jit
        value, derivative = torch.func.jvp(function, points, tangents)  # type: ignore[misc]
    return value, derivative
