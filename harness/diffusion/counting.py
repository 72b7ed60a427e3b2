"""FLOP counts of executed code, and forward-mode derivatives, which count as three forwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode


def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of the matrix products, convolutions and attentions of `run()`, backward included.

    The formulas are torch's. Attention runs under the MATH backend: torch 2.13 counts the fused one
    on the CPU as 0.
    """
    from torch.utils.flop_counter import flop_registry  # it imports triton, which takes long

    with sdpa_kernel(SDPBackend.MATH), _Counter(flop_registry) as counted:
        run()
    return counted.flops


class _Counter(TorchDispatchMode):
    """Adds up the FLOPs of operations, and nothing else.

    Torch's `FlopCounterMode` takes longer: it also tells modules apart, and asks of every operation
    anew whether it has parts.
    """

    def __init__(self, formulas: Mapping[Any, Callable[..., int]]):
        super().__init__()
        self.formulas, self.flops = formulas, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        formula = self.formulas.get(func._overloadpacket)
        if formula is None and _has_parts(func):
            with self:
                return func.decompose(*args, **given)
        out = func(*args, **given)
        if formula is not None:
            self.flops += formula(*args, **given, out_val=out)
        return out


@cache
def _has_parts(func: Any) -> bool:
    """Whether an operation is made of others, which inference mode does not show by itself.

    `prim::device`, which tensors of an imitated device are asked, has no kernels to look up.
    """
    if func is torch.ops.prim.device.default:
        return False
    return func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


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
