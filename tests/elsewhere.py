"""A second device for machines that have none: its tensors are on the CPU, but may not meet those that say so, as on a GPU.

Its name is `meta`, the one that torch takes without a driver. It knows no forward mode.
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
"""Operations that may see both devices; the result is where the first tensor is, if they are not told."""
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
"""Operations whose indices, the second argument, may stay on the CPU."""
LISTED = ("cat", "stack")
"""Operations for which a number on the CPU is a tensor like others."""


class Away(Tensor):
    """A tensor elsewhere; `here` holds its numbers."""

    here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor) -> Away:
        found = Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=CPU, dispatch_device=True
        )
        found.here = here
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return perform(func, args, kwargs or {})


class _Watch(TorchDispatchMode):
    """Sees also what is made elsewhere from nothing, or goes there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return perform(func, args, kwargs or {})


def perform(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operation on tensors of either device. Raises RuntimeError, as CUDA does, if it mixes them."""
    if func is torch.ops.prim.device.default:
        return ELSEWHERE
    name, told = func._schema.name.removeprefix("aten::"), kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    any_away = any(isinstance(tensor, Away) for tensor in tensors)
    if not any_away and (told is None or torch.device(told) == CPU):
        return func(*args, **kwargs)
    if any_away and name not in MOVES:
        _refuse_strangers(name, [args[0], *args[2:3]] if name in INDEXED else tensors)
    inner_args, inner_kwargs = tree_map(lambda x: x.here if isinstance(x, Away) else x, (args, kwargs))
    if told is not None:
        inner_kwargs["device"] = CPU
    out = func(*inner_args, **inner_kwargs)
    if torch.device(told) == CPU if told is not None else name in MOVES and not isinstance(args[0], Away):
        return out
    return return_and_correct_aliasing(func, args, kwargs, tree_map(lambda x: Away(x) if isinstance(x, Tensor) else x, out))


def _refuse_strangers(name: str, met: list[Any]) -> None:
    for tensor in met:
        if isinstance(tensor, Tensor) and not isinstance(tensor, Away) and (tensor.dim() or name in LISTED):
            raise RuntimeError(f"{name} expects all tensors on one device, but one of shape {tuple(tensor.shape)} is on the CPU")


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Inside, there is a second device."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters that move stay those that an optimizer knows
    try:
        with _Watch():
            yield ELSEWHERE
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
