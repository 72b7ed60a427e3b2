"""The database of studies: `harness.db` in the results folder, an SQLite file of Optuna's.

`optuna-dashboard` reads it, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from harness.errors import UsageError
from harness.sweeps.study import StudyPlan

ANSWERED = (TrialState.COMPLETE, TrialState.PRUNED)
"""States of trials that need no further run."""


def open_study(plan: StudyPlan, results: Path) -> optuna.Study:
    """The study of a plan, made if it is new. Raises UsageError if the file cannot be read."""
    directions = list(plan.spec.objectives.values())
    return optuna.create_study(
        storage=_database(results), study_name=plan.name, directions=directions, load_if_exists=True
    )


def known_study(plan: StudyPlan, results: Path) -> optuna.Study | None:
    """The study of a plan, or None. Raises UsageError if the file cannot be read."""
    if not (results / "harness.db").exists() or plan.name not in optuna.get_all_study_names(
        _database(results)
    ):
        return None
    return open_study(plan, results)


def _database(results: Path) -> optuna.storages.RDBStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.storages.RDBStorage(f"sqlite:///{results.resolve() / 'harness.db'}")
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
