"""The database of studies: `harness.db` in the results folder, an SQLite file of Optuna's.

`optuna-dashboard` reads it, too.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState

from harness.errors import UsageError
from harness.files import digest, inside
from harness.seals import CHANGED, SEAL
from harness.sweeps.study import StudyPlan

FILE = "harness.db"

UNWRITABLE = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_FSYNC,
    sqlite3.SQLITE_IOERR_TRUNCATE,
)
"""Codes of SQLite where a file or its folder cannot be written."""
ANSWERED = (TrialState.COMPLETE, TrialState.PRUNED)
"""States of trials that need no further run."""


def open_study(plan: StudyPlan, results: Path) -> optuna.Study:
    """The study of a plan, made if it is new. Raises UsageError if the file is damaged."""
    directions = list(plan.spec.objectives.values())
    with _readable(results):
        study = optuna.create_study(
            storage=_database(results),
            study_name=plan.name,
            directions=directions,
            load_if_exists=True,
        )
        for trial in study.get_trials(deepcopy=False):
            seal = _seal(trial, trial.state, trial.values)
            if trial.state.is_finished() and trial.user_attrs.get(SEAL, seal) != seal:
                raise ValueError(f"trial {trial.number} of study {plan.name}: {CHANGED}")
    return study


def known_study(plan: StudyPlan, results: Path) -> optuna.Study | None:
    """The study of a plan, or None. Raises UsageError if the file is damaged."""
    if not (results / FILE).exists():
        return None
    with _readable(results):
        known = plan.name in optuna.get_all_study_names(_database(results))
    return open_study(plan, results) if known else None


def _database(results: Path) -> optuna.storages.RDBStorage:
    """The storage, once SQLite finds the file's structure whole."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = inside(results / FILE, results).absolute()
    if "?" in str(path):
        raise UsageError(f"{path} has a '?', which SQLite takes for an option: rename the folder")
    if path.exists():
        with closing(sqlite3.connect(path, timeout=60)) as connection:
            ((found, *_),) = connection.execute("PRAGMA integrity_check(1)")
        if found != "ok":
            raise ValueError(found)
    return optuna.storages.RDBStorage(f"sqlite:///{path}")


@contextmanager
def _readable(results: Path) -> Iterator[None]:
    """Inside, what a damaged or hostile database raises becomes a sentence."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # of many kinds of SQLite's, SQLAlchemy's and Optuna's
        _refuse_full_disk(error, results)
        reason = str(error).partition("\n")[0] if isinstance(error, ValueError) else ""
        raise UsageError(
            f"cannot read the studies in {results / FILE} ({reason or type(error).__name__}): "
            "move the file away, and the same search begins anew with the finished runs"
        ) from error


@contextmanager
def writable(results: Path) -> Iterator[None]:
    """Inside, a database that cannot be written, such as on a full disk, becomes a sentence."""
    try:
        yield
    except StorageInternalError as error:
        _refuse_full_disk(error, results)
        raise


def _refuse_full_disk(error: BaseException | None, results: Path) -> None:
    """Raises UsageError if SQLite could not write."""
    while error is not None:
        if isinstance(error, sqlite3.Error):
            code = getattr(error, "sqlite_errorcode", 0)
            if code in UNWRITABLE or code & 0xFF in UNWRITABLE:
                raise UsageError(
                    f"cannot write {results / FILE}: {error}; free some space, or let the folder "
                    "be written, and the same search goes on"
                ) from error
        error = error.__cause__ or error.__context__


def _seal(trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> str:
    """SHA-256 of what a trial holds once its state and values are told."""
    attributes = {name: value for name, value in trial.user_attrs.items() if name != SEAL}
    points = sorted(trial.intermediate_values.items())
    told = list(map(float, values or [])) if state == TrialState.COMPLETE else []
    return digest([trial.params, attributes, points, told, state.name])


def tell(
    study: optuna.Study, number: int, state: TrialState, values: Sequence[float] | None = None
) -> None:
    """Seals a trial and tells its end, so that damage to the file is noticed later."""
    frozen = study.get_trials(deepcopy=False)[number]
    handle = optuna.trial.Trial(study, frozen._trial_id)
    handle.set_user_attr(SEAL, _seal(frozen, state, values))
    study.tell(number, values, state)


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
