"""torch.compile for tests.

Tests use its own backend where there is a C++ compiler. The eager backend needs none and takes a
fraction of the time.
"""

from __future__ import annotations

import os
import shlex
import shutil
from typing import Any

import pytest
from torch import nn

from harness.networks import compiling
from harness.runs import run

COMPILER = shlex.split(os.environ.get("CXX") or "g++")[0]
needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER) is None,
    reason=f"torch.compile needs a C++ compiler, not found: {COMPILER}",
)


def run_graphs_eagerly(patch: pytest.MonkeyPatch) -> None:
    """Captures graphs as usual but generates no code for them, so that no compiler is needed."""
    compile_module = nn.Module.compile

    def compile_eagerly(self: nn.Module, *args: Any, **options: Any) -> None:
        compile_module(self, *args, **{"backend": "eager", **options})

    patch.setattr(nn.Module, "compile", compile_eagerly)
    for module in (compiling, run):
        patch.setattr(module, "check_compiler", lambda: None)
