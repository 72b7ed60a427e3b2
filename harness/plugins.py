"""Plug-ins: Python files that register methods, solvers and metrics when they are loaded.

An installed package can register the same by entry points (see `registry.py`). A task needs no
plug-in: `--task FILE.yaml` reads its file.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from harness.errors import HarnessError, UsageError
from harness.provenance import PLUGIN_SOURCES


def load_plugin(path: Path) -> None:
    """Loads a file once; its content enters the code digest of records.

    Raises UsageError if it cannot be loaded.
    """
    path = path.resolve()
    if path in PLUGIN_SOURCES:
        return
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    if path.suffix != ".py":
        raise UsageError(f"plug-in {path} is not a Python file; a task is a YAML file: give it as --task {path}")
    content, name = path.read_bytes(), f"harness_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic and dataclasses look annotations up there
    try:
        spec.loader.exec_module(module)
    except HarnessError:
        raise
    except Exception as error:  # a plug-in may raise anything
        del sys.modules[name]
        raise UsageError(f"plug-in {path} cannot be loaded ({type(error).__name__}: {error})") from error
    PLUGIN_SOURCES[path] = content
