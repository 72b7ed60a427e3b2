"""The database of studies: `harness.db` in the results folder, an SQLite file of Optuna's.

`optuna-dashboard` reads it, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from harness.errors import UsageError
from harness.files import inside
from harness.sweeps.study import StudyPlan

ANSWERED = (TrialState.COMPLETE, TrialState.PRUNED)
"""States of trials that need no further run."""


def open_study(plan: StudyPlan, results: Path) -> optuna.Study:
    """The study of a plan, made if it is new. Raises UsageError if the file cannot be read."""
    directions, storage = list(plan.spec.objectives.values()), _database(results)
    with _reading(results):
        found = optuna.create_study(
            storage=storage, study_name=plan.name, directions=directions, load_if_exists=True
        )
        found.get_trials(deepcopy=False)
    return found


def known_study(plan: StudyPlan, results: Path) -> optuna.Study | None:
    """The study of a plan, or None. Raises UsageError if the file cannot be read."""
    if not (results / "harness.db").exists():
        return None
    storage = _database(results)
    with _reading(results):
        names = optuna.get_all_study_names(storage)
    return open_study(plan, results) if plan.name in names else None


def _database(results: Path) -> optuna.storages.RDBStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    place = inside(results / "harness.db", results).absolute()
    if "?" in str(place):
        raise UsageError(f"{place} has a '?', which SQLite takes for an option: rename the folder")
    with _reading(results):
        return optuna.storages.RDBStorage(f"sqlite:///{place}")


@contextmanager
def _reading(results: Path) -> Iterator[None]:
    """Inside, whatever a database of others raises is one sentence."""
    try:
        yield
    except Exception as error:  # of SQLAlchemy's many kinds
        raise UsageError(
            f"cannot read the studies in {results / 'harness.db'} ({type(error).__name__}): "
            "move the file away"
        ) from error


def finished_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that have values of their own: neither failed nor pruned ones."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [trial for trial in complete if "reason" not in trial.user_attrs]


def lines_of(plan: StudyPlan, study: optuna.Study) -> list[dict[str, Any]]:
    """One row per trial: number, state, values of the space, objectives, whether it is best."""
    trials, finished = study.get_trials(deepcopy=False), finished_trials(study)
    best = {trial.number for trial in study.best_trials} if finished else set()
    lines = []
    for trial in trials:
        values = dict(zip(plan.spec.objectives, trial.values or [], strict=False))
        state = "failed" if "reason" in trial.user_attrs else trial.state.name.lower()
        reason = {"reason": trial.user_attrs["reason"]} if "reason" in trial.user_attrs else {}
        lines.append(
            {
                "study": plan.name,
                "trial": trial.number,
                "state": state,
                **plan.spec.rounded(trial.params),
                **values,
                **reason,
                "answered": trial.state in ANSWERED,
                "best": trial.number in best and not reason,
            }
        )
    return lines
