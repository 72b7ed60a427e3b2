"""Runs on the tiny task of the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness.runs.config import RunConfig, parse_config
from harness.runs.log import silent
from harness.runs.resolve import resolve
from harness.runs.run import Run
from harness.tasks import Task

CPU = torch.device("cpu")
ARD = {"history_layers": 2}


def changed(task: Task, **changes: Any) -> Task:
    """The task with parts of its spec replaced; a dictionary replaces parts of a part."""
    spec = task.spec
    for name, value in changes.items():
        part = getattr(spec, name)
        value = part.model_copy(update=value) if isinstance(value, dict) else value
        spec = spec.model_copy(update={name: value})
    return Task(spec, task.folder)


def config(**changes: Any) -> RunConfig:
    return parse_config(
        {"method": "ard", "task": "tiny", "num_steps": 2, "options": ARD, **changes}
    )


def new_run(folder: Path, report: Callable = silent, **changes: Any) -> Run:
    return Run(resolve(config(**changes)), folder, CPU, report)
