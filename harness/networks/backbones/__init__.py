"""Diffusion transformers by description, seen through one interface.

A description is a mapping, as in a task's `network`:

- `backbone: dit` (the default): arguments of our DiT (`dit.py`); `size: DiT-XL/2` stands for depth,
  width, heads and patch.
- `backbone: diffusers`: `class`, `config` and `source` of a transformer of diffusers
  (`diffusers.py`).
- `backbone: prompted`: our DiT with a text encoder before it (`prompted.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.errors import unknown
from harness.networks.backbones import diffusers, dit, prompted
from harness.networks.backbones.base import Backbone

__all__ = ["Backbone", "build", "check", "depth_of", "sizes_of"]

FAMILIES: dict[str, Any] = {"dit": dit, "diffusers": diffusers, "prompted": prompted}


def _family(network: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The module of a description's family, and the description without its name."""
    options = dict(network)
    name = options.pop("backbone", "dit")
    if not isinstance(name, str) or name not in FAMILIES:
        raise unknown("backbone", str(name), FAMILIES, "network")
    return FAMILIES[name], options


def check(network: Mapping[str, Any]) -> None:
    """Raises UsageError for a description that no network fits; imports no library."""
    family, options = _family(network)
    family.check(options)


def build(
    network: Mapping[str, Any], scalars: Sequence[str] = (), extra_channels: int = 0
) -> Backbone:
    """The network of a description, with new weights.

    Args:
        scalars: names of the inputs beside time and conditions (`Condition.scalars`).
        extra_channels: further channels of the input, which the output lacks.

    Raises UsageError for a description that does not fit.
    """
    family, options = _family(network)
    return family.build(options, scalars, extra_channels)


def depth_of(network: Mapping[str, Any]) -> int:
    """The number of blocks of a description. Raises UsageError if it does not say."""
    family, options = _family(network)
    return family.depth_of(options)


def sizes_of(network: Mapping[str, Any]) -> tuple[int | None, Any]:
    """Channels and side (a number, or height and width) of what a description denoises.

    None stands for what it leaves open.
    """
    family, options = _family(network)
    return family.sizes_of(options)
