"""Searches that tests make: a sweep file's content, and what is left of its studies."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from inprocess import driver

from harness.runs.run import Run
from harness.sweeps.search import Searcher
from harness.sweeps.study import StudyPlan

CPU = torch.device("cpu")
SPACE = {
    "options.lr": {"low": 1e-4, "high": 1e-1, "log": True},
    "options.heads": ["shared", "per_step"],
}


def content(**changes: Any) -> dict[str, Any]:
    search = {"trials": 4, "objectives": {"fid": "minimize"}, "space": SPACE, **changes}
    return {
        "base": {
            "task": "tiny",
            "num_steps": 2,
            "budget": "steps=2",
            "method": "step-distillation",
        },
        "search": search,
    }


def made(plan: StudyPlan, folder: Path, workers: int = 1, **more: Any) -> optuna.Study:
    """The study after its search."""
    return Searcher(plan, folder, CPU, driver(workers), **more).make()


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


def distance(run: Run) -> float:
    """How far log10 of a run's learning rate is from -2."""
    return abs(math.log10(run.resolved.config.lr) + 2)  # type: ignore[attr-defined]


def fail_at(
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    error: Callable[[], BaseException],
    executed: list[Any],
) -> None:
    """From now on the run of this number fails, its record says why, and `error` is raised."""
    answered = Run.execute

    def execute(self: Run, *args: Any, **more: Any) -> Any:
        answered(self, *args, **more)
        if len(executed) == number:
            self.record_failure("the loss is not finite")
            raise error()

    monkeypatch.setattr(Run, "execute", execute)
