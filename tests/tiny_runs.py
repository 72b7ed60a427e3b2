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

CPU = torch.device("cpu")
ARD = {"history_layers": 2}


def config(**changes: Any) -> RunConfig:
    return parse_config(
        {"method": "ard", "task": "tiny", "num_steps": 2, "options": ARD, **changes}
    )


def new_run(folder: Path, report: Callable = silent, **changes: Any) -> Run:
    return Run(resolve(config(**changes)), folder, CPU, report)
