"""torch.compile: a deep transformer's blocks run the same code, which is compiled once."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain

import torch
from torch import nn

from harness.errors import UsageError
from harness.networks.backbones import Backbone

WHOLE = 8
"""The largest number of blocks of a network that is compiled as a whole: fewer launches, but its
compiling takes time for each block."""
GRAPHS_OF_A_BLOCK = 64
"""The number of graphs that torch keeps of one block's code, over all shapes of a run.

Beyond this number torch silently stops compiling.
"""


def check_compiler() -> None:
    """Raises UsageError where torch.compile finds no C++ compiler."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")[0]
    if shutil.which(compiler) is None:
        raise UsageError(
            f"compile needs a C++ compiler, but there is no {compiler!r} here: "
            "install it or name one in CXX"
        )


def transformers(modules: Iterable[nn.Module]) -> list[Backbone]:
    """All transformers among modules and their parts, each once."""
    found = {id(m): m for top in modules for m in top.modules() if isinstance(m, Backbone)}
    return list(found.values())


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks of all transformers in a network."""
    return [block for found in transformers([network]) for block in found.blocks]


def compile_networks(networks: Iterable[nn.Module]) -> list[nn.Module]:
    """Compiles the blocks of deep transformers, and other networks as a whole.

    The graphs of earlier networks are dropped first, because they count towards the limit.

    Returns:
        What was compiled.

    Raises UsageError where torch.compile finds no C++ compiler.
    """
    check_compiler()
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = GRAPHS_OF_A_BLOCK
    parts = list(chain.from_iterable(_parts(network) for network in networks))
    for part in parts:
        part.compile(dynamic=False)  # a graph of its own for each shape is the faster one
    return parts


def _parts(network: nn.Module) -> list[nn.Module]:
    blocks = blocks_of(network)
    return blocks if len(blocks) > WHOLE else [network]


@contextmanager
def compiled(network: object, wanted: bool = True) -> Iterator[None]:
    """Inside, a network is compiled if that is wanted; what is no module stays as it is."""
    parts = compile_networks([network]) if wanted and isinstance(network, nn.Module) else []
    try:
        yield
    finally:
        for part in parts:
            part._compiled_call_impl = None  # torch has no call that undoes Module.compile


def uncompiled(wanted: bool = True) -> AbstractContextManager[object]:
    """Inside, compiled networks run as they are, if that is wanted."""
    return torch.compiler.set_stance("force_eager") if wanted else nullcontext()
