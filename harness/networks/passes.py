"""Counts of network passes, from which the NFE is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from harness.networks.backbones import Backbone


@dataclass
class Passes:
    """A count of network passes: one for each sample and each state of a trajectory."""

    total: int = 0


@contextmanager
def count_passes(network: nn.Module) -> Iterator[Passes]:
    """Counts the passes through `network` inside the block; a sample's share is its NFE."""
    passes = Passes()

    def count(module: nn.Module, args: tuple) -> None:
        passes.total += args[0].shape[:-3].numel()

    # Some callers run a part of the blocks alone.
    entrance = network.patch_embedding if isinstance(network, Backbone) else network
    handle = entrance.register_forward_pre_hook(count)
    try:
        yield passes
    finally:
        handle.remove()
