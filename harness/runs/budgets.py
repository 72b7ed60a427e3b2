"""Budgets: from a name, or a number of steps, images, FLOPs or seconds, to training steps."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from harness import ranks
from harness.errors import UsageError
from harness.tasks import Task
from harness.training.estimate import NOMINAL_STEPS, seconds_a_step, steps_within
from harness.training.trainer import Trainer

LARGEST = {"steps": 5e8, "images": 1e12, "flops": 1e24, "seconds": 1e8}
"""The units of a budget, and the largest number of each."""
NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?([eE][+]?[0-9]+)?")


def parse_budget(budget: str, task: Task) -> tuple[str, float]:
    """The unit and number of a budget such as "flops=6e12".

    Raises UsageError if the text is no budget.
    """
    unit, _, text = budget.partition("=")
    number = float(text) if NUMBER.fullmatch(text) else math.nan
    if unit in ("steps", "images") and not number.is_integer():
        number = math.nan
    if number > LARGEST.get(unit, math.inf):
        raise UsageError(f"budget is {budget[:60]!r}, but {unit} are at most {LARGEST[unit]:g}")
    if unit not in LARGEST or not 0 <= number <= LARGEST[unit]:
        forms = [*task.spec.budgets, *(f"{unit}=NUMBER" for unit in LARGEST)]
        raise UsageError(f"budget is {budget!r}, but must be one of: {', '.join(forms)}")
    return unit, number


def training_steps(
    budget: str,
    task: Task,
    batch_size: int,
    rehearse: Callable[[int], Trainer],
    stored: Callable[[], float],
) -> int:
    """The training steps of a budget. FLOPs include those of the trajectories.

    Args:
        rehearse: returns a trainer of so many steps, on which FLOPs and seconds are measured.
        stored: returns the FLOPs of the run's trajectories.

    Raises UsageError if the budget is unknown, or smaller than one step.
    """
    if budget in task.spec.budgets:
        return task.spec.budgets[budget].steps
    unit, number = parse_budget(budget, task)
    count = {
        "steps": lambda: int(number),
        "images": lambda: int(number) // batch_size,
        "flops": lambda: steps_within(number - stored(), rehearse),
        "seconds": lambda: int(number / seconds_a_step(rehearse(NOMINAL_STEPS))),
    }
    if unit == "seconds" and ranks.count() > 1:
        raise UsageError(
            f"budget is {budget!r}, but seconds are measured on one process: give several ranks "
            "steps, images or flops"
        )
    steps = count[unit]()
    if steps == 0 and budget != "steps=0":
        beside = f" beside {stored():.3g} FLOPs of trajectories" if unit == "flops" else ""
        raise UsageError(
            f"budget is {budget!r}, which is less than one training step of {batch_size} images"
            f"{beside}"
        )
    if steps > LARGEST["steps"]:
        raise UsageError(
            f"budget is {budget!r}, which is {steps:.3g} training steps of {batch_size} images, "
            f"but a run has at most {LARGEST['steps']:g}"
        )
    return steps


def evaluated_noise_sets(budget: str, wanted: int | None, task: Task) -> int:
    """The number of noise sets: as wanted, or a named budget's, or all of the task's.

    Raises UsageError if more are wanted than the task has.
    """
    most = task.spec.evaluation.noise_sets
    if wanted is not None and wanted > most:
        raise UsageError(f"noise_sets is {wanted}, but task {task.spec.name} has {most}")
    named = task.spec.budgets.get(budget)
    return wanted or (named.noise_sets if named else most)
