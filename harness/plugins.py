"""Plug-in files: Python files outside the package that register methods, solvers and metrics.

An installed package can offer the same classes by entry points (`registry.py`). A task is no
plug-in but a YAML file: `--task FILE.yaml` reads it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from harness.errors import HarnessError, UsageError
from harness.provenance import PLUGIN_SOURCES


def load_plugin(path: Path) -> None:
    """Imports a file once and adds it to the code digest of records.

    Raises UsageError if the file is missing or fails.
    """
    path = path.resolve()
    if path in PLUGIN_SOURCES:
        return
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    if path.suffix != ".py":
        raise UsageError(
            f"plug-in {path} is not a Python file; a task is a YAML file: give it as --task {path}"
        )
    content, name = path.read_bytes(), f"harness_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where pydantic and dataclasses look up annotations
    try:
        spec.loader.exec_module(module)
    except HarnessError:
        raise
    except Exception as error:  # a file from outside may raise anything
        del sys.modules[name]
        raise UsageError(
            f"plug-in {path} cannot be loaded ({type(error).__name__}: {error})"
        ) from error
    PLUGIN_SOURCES[path] = content
