"""The contract of a method, as checks that run on any registered method in seconds.

`harness test-method FILE` runs them on the methods of a plug-in; the tests run them on the built-in
methods.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.errors import UsageError
from harness.methods import METHODS
from harness.training.case import Case
from harness.training.exact_checks import default_steps
from harness.training.level_checks import gradient_by_level, trained_levels
from harness.training.precision_checks import precision
from harness.training.prompt_checks import padding
from harness.training.purpose_checks import blind
from harness.training.rank_checks import ranks_agree
from harness.training.sampling_checks import (
    canonical,
    generator,
    names,
    neighbours,
    points,
    sampling,
    training_free,
    tunes,
    untrained,
)
from harness.training.tiny_task import tiny_task
from harness.training.training_checks import (
    accumulation,
    any_step,
    averaged,
    finite,
    isolation,
    own_state,
    resume,
    seeded,
)

Check = Callable[[Case], None]
EVERY: tuple[Check, ...] = (
    names,
    canonical,
    sampling,
    points,
    neighbours,
    untrained,
    generator,
    padding,
    default_steps,
)
"""Checks of all methods."""
TRAINED: tuple[Check, ...] = (
    finite,
    precision,
    isolation,
    averaged,
    accumulation,
    resume,
    own_state,
    seeded,
    blind,
    any_step,
    gradient_by_level,
    trained_levels,
    tunes,
)
"""Checks of methods that train."""
UNTRAINED: tuple[Check, ...] = (training_free,)
"""Checks of methods without training."""


def checks_of(name: str) -> tuple[Check, ...]:
    """The checks that a method must pass."""
    return (*EVERY, *(TRAINED if METHODS[name].sources else UNTRAINED))


@dataclass(frozen=True)
class Outcome:
    """One check of one method.

    Attributes:
        check: name of the check.
        what: the first line of its docstring.
        problem: the error; empty if the method passed.
    """

    check: str
    what: str
    problem: str = ""


def few_steps(case: Case) -> int:
    """Two sampling steps, or one for a method that takes no more."""
    try:
        case.cls.check(case.config, case.task, 2)
    except UsageError:
        return 1
    return 2


def run_checks(
    name: str,
    folder: Path,
    options: dict[str, Any] | None = None,
    prompts: bool = False,
    ranks: bool = False,
) -> Iterator[Outcome]:
    """Runs all checks of a method, one after the other.

    Args:
        prompts: whether the task has prompts in place of class labels.
        ranks: whether to check training on two ranks too, which starts two processes.

    Raises UsageError for prompts if the method needs class labels.
    """
    task = tiny_task(folder / "task", prompts)
    METHODS[name].check_conditions(task.spec.name, prompts)
    more = (ranks_agree,) if ranks and METHODS[name].sources else ()
    for check in (*checks_of(name), *more):
        what = (check.__doc__ or "").strip().partition("\n")[0]
        try:
            case = Case(name, task, folder / check.__name__, dict(options or {}))
            check(replace(case, num_steps=few_steps(case)))
        except Exception as error:  # a plug-in may raise anything
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = (
                ""
                if isinstance(error, AssertionError)
                else f" ({Path(where.filename).name}:{where.lineno})"
            )
            yield Outcome(
                check.__name__, what, f"{type(error).__name__}: {str(error).strip()}{place}"
            )
        else:
            yield Outcome(check.__name__, what)
