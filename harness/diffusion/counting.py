"""FLOP counts of executed code, and forward-mode derivatives that count as two forwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


class _Counter:
    """A running FLOP counter, and the FLOPs to subtract from its total."""

    def __init__(self, counted: FlopCounterMode):
        self.counted, self.overcounted = counted, 0


_running: list[_Counter] = []


def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of the matrix products, convolutions and attentions of `run()`, backward included.

    Attention runs under the MATH backend: torch 2.13 counts the fused one on the CPU as 0.
    """
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton, which takes long

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        counter = _Counter(counted)
        _running.append(counter)
        try:
            run()
        finally:
            _running.pop()
    return counted.get_total_flops() - counter.overcounted


def jvp(
    function: Callable[..., Tensor], points: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The value of a function and its derivative along the tangents, by forward mode.

    It runs in float32 without fused attention. Gradients flow through the value as usual.
    A FLOP count charges the pair as two forwards. Forward mode dispatches three, of which one
    repeats the value.
    """
    before = _running[-1].counted.get_total_flops() if _running else 0
    with (
        torch.autocast(points[0].device.type, enabled=False),
        sdpa_kernel(SDPBackend.MATH),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of torch.jit
        value, derivative = torch.func.jvp(function, points, tangents)  # type: ignore[misc]
    if _running:
        _running[-1].overcounted += (_running[-1].counted.get_total_flops() - before) // 3
    return value, derivative
