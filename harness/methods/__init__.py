"""Distillation methods, one file each; what several share lies in `parts/`.

A file declares its name by `@METHODS.register("name")` and is imported when that name is looked up.
"""

from harness.methods.base import METHODS, Batch, Method, MethodConfig, Player, Problem, Update

__all__ = ["METHODS", "Batch", "Method", "MethodConfig", "Player", "Problem", "Update"]
