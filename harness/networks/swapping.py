"""Another class for a module that exists, so that its weights, keys and callers stay as they are.

A patched `forward` would not do: `copy.deepcopy` copies the reference, so that the average of a
network would run the layers of the original.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


class Swapped:
    """The base of classes that a module may take on in front of its own.

    Copies and pickles name both classes, since the joint one is made at run time.
    """

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, type(self).__bases__, self.__getstate__()


@cache
def _joint(front: Any, own: Any) -> Any:
    return type(front.__name__ + own.__name__, (front, own), {"__doc__": front.__doc__})


def _blank(front: Any, own: Any) -> nn.Module:
    cls = _joint(front, own)
    return cls.__new__(cls)


def swap(module: nn.Module, front: Any, **attributes: Any) -> None:
    """Puts a class, based on `Swapped`, in front of a module's own; the attributes belong to it."""
    own: Any = type(module)
    module.__class__ = _joint(front, own)
    for name, value in attributes.items():
        setattr(module, name, value)
