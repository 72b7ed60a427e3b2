"""Activation checkpointing: a block keeps its inputs alone, and runs again in the backward pass.

It takes a third more arithmetic of training and changes no number (Chen et al. 2016, arXiv
1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from harness.networks.compiling import transformers
from harness.networks.history import recalled
from harness.networks.swapping import Swapped, swap


class Recomputed(Swapped, nn.Module):
    """A block of a transformer that keeps its inputs alone where gradients flow.

    In a pass with its derivative (JVP) it keeps everything: torch cannot run that again.
    """

    wanted: ClassVar[bool] = True
    inside: Callable[..., Any] | None

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles what runs again; torch cannot compile the running again of history layers."""
        self.inside = torch.compile(super().forward, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.inside or super().forward
        derivative = forward_ad._current_level >= 0
        if derivative or not (Recomputed.wanted and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        again = recalled(self)
        calls = iter([nullcontext, again])  # a pass since then has left other states

        def run(*args: Any, **kwargs: Any) -> Any:
            with next(calls)():
                return forward(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def checkpoint_activations(modules: Iterable[nn.Module]) -> None:
    """Makes the blocks of all transformers among modules and their parts keep inputs alone."""
    for network in transformers(modules):
        for block in network.blocks:
            swap(block, Recomputed, inside=None)


@contextmanager
def activations_kept() -> Iterator[None]:
    """Inside, blocks keep everything, so that their arithmetic counts once."""
    Recomputed.wanted = False
    try:
        yield
    finally:
        Recomputed.wanted = True
