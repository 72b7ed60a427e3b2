"""Counts of network passes, from which the NFE is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from harness.networks.dit import Trunk


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

    # Some callers run the blocks of a trunk alone.
    entrance = network.x_embedder if isinstance(network, Trunk) else network
    handle = entrance.register_forward_pre_hook(count)
    try:
        yield passes
    finally:
        handle.remove()
