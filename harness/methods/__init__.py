"""Distillation methods, one file each. Floor 4: may import floors 0 to 3.

Every module of this package is imported here, so a new file is a new method.
"""

import importlib
import pkgutil

from harness.methods.base import METHODS, Batch, Method, MethodConfig, Player, Problem, Update

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "Batch", "Method", "MethodConfig", "Player", "Problem", "Update"]
