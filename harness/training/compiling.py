"""torch.compile for the networks that are trained."""

from __future__ import annotations

import os
import shlex
import shutil

import torch

from harness.errors import UsageError
from harness.methods.base import Method

GRAPHS_OF_A_NETWORK = 64
"""The number of graphs that torch keeps of one network, over all shapes and states of a run.

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


def compile_players(method: Method) -> None:
    """Compiles the networks of all players.

    The graphs of earlier methods are dropped first, because they count towards the limit.

    Raises UsageError where torch.compile finds no C++ compiler.
    """
    check_compiler()
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = GRAPHS_OF_A_NETWORK
    for player in method.players.values():
        player.module.compile()
