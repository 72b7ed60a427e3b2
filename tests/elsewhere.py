"""A second device for machines without a GPU: mixing its tensors with the CPU's raises, as on CUDA.

Its numbers are computed on the CPU. Its name is `meta`, the one that torch accepts without a
driver. It does not support forward-mode derivatives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")
MOVES = ("_to_copy", "copy_")
"""Operations that may see both devices. The result is on the first tensor's unless one is given."""
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
"""Operations whose indices, the second argument, may stay on the CPU."""
LISTED = ("cat", "stack")
"""Operations that refuse even a 0-dimensional tensor of the other device."""


class Away(Tensor):
    """A tensor on the second device; `here` holds its numbers."""

    here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor) -> Away:
        found = Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=CPU,
            dispatch_device=True,
        )
        found.here = here
        return found

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return perform(func, args, kwargs or {})


class _Watch(TorchDispatchMode):
    """Also sees operations that create tensors on the second device, or move them there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return perform(func, args, kwargs or {})


def perform(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Performs an operation on either device. Raises RuntimeError, as CUDA does, for a mixture."""
    if func is torch.ops.prim.device.default:
        return ELSEWHERE
    name, target = func._schema.name.removeprefix("aten::"), kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    any_away = any(isinstance(tensor, Away) for tensor in tensors)
    if not any_away and (target is None or torch.device(target) == CPU):
        return func(*args, **kwargs)
    if any_away and name not in MOVES:
        _refuse_mixture(name, [args[0], *args[2:3]] if name in INDEXED else tensors)
    inner_args, inner_kwargs = tree_map(
        lambda x: x.here if isinstance(x, Away) else x, (args, kwargs)
    )
    if target is not None:
        inner_kwargs["device"] = CPU
    out = func(*inner_args, **inner_kwargs)
    moved_here = name in MOVES and not isinstance(args[0], Away)
    if torch.device(target) == CPU if target is not None else moved_here:
        return out
    return return_and_correct_aliasing(
        func, args, kwargs, tree_map(lambda x: Away(x) if isinstance(x, Tensor) else x, out)
    )


def _refuse_mixture(name: str, met: list[Any]) -> None:
    for tensor in met:
        if (
            isinstance(tensor, Tensor)
            and not isinstance(tensor, Away)
            and (tensor.dim() or name in LISTED)
        ):
            raise RuntimeError(
                f"{name} expects all tensors on one device, "
                f"but one of shape {tuple(tensor.shape)} is on the CPU"
            )


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Inside the block there is a second device."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # an optimizer keeps its parameters
    try:
        with _Watch():
            yield ELSEWHERE
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
