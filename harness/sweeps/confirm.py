"""Confirmation: the best settings of a search and trial 0's run again, on seeds of their own.

The best of many trials looks better than it is. So the settings that matter are made anew, at the
whole budget, and the best mean of these runs wins. Trial 0 is always among them: a method whose
search found nothing keeps its own defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial
from pydantic import BaseModel, ConfigDict

from harness.errors import UsageError
from harness.records import Record
from harness.runs.resolve import Resolved, resolve
from harness.runs.run import Run
from harness.sweeps.child import UNTRACKED, Tracking
from harness.sweeps.database import finished_trials
from harness.sweeps.driver import Driver
from harness.sweeps.study import StudyPlan, objective
from harness.sweeps.sweep import Cell, run_sweep


class Confirmed(BaseModel):
    """The confirmation of one trial's setting.

    Attributes:
        params: the values of the space.
        values: the objective by seed; a run that failed has none.
        reason: why one failed.
    """

    model_config = ConfigDict(extra="forbid")

    trial: int
    params: dict[str, Any]
    values: dict[int, float]
    run_ids: list[str]
    reason: str = ""

    @property
    def mean(self) -> float | None:
        """The mean over the seeds; None if one failed."""
        return None if self.reason else sum(self.values.values()) / len(self.values)


def confirm(
    studies: Sequence[tuple[StudyPlan, optuna.Study]],
    results: Path,
    device: torch.device,
    driver: Driver[Cell],
    reuse: bool = False,
    say: Callable[[str], None] = print,
    tracking: Tracking = UNTRACKED,
) -> list[list[Confirmed]]:
    """Makes the confirming runs of all studies at once, and returns what each study found.

    A study whose file has no `confirm` has none. Finished runs are taken, interrupted ones resume.
    """
    cells: dict[str, Cell] = {}
    wanted: list[list[tuple[FrozenTrial, list[Resolved]]]] = []
    for plan, study in studies:
        settings = []
        for trial in chosen(plan, study):
            configs = plan.confirmations_of(trial.params)
            runs = [resolve(config, results=results, device=device) for config in configs]
            for config, run in zip(configs, runs, strict=True):
                record = Run(run, results, device).finished_record(reuse)
                cells.setdefault(run.run_id, Cell(config, run, record))
            settings.append((trial, runs))
        wanted.append(settings)
    made = run_sweep(list(cells.values()), results, device, driver, reuse, say, tracking)
    records = dict(zip(cells, made, strict=True))
    return [
        [_confirmed(plan, trial, runs, records) for trial, runs in settings]
        for (plan, _), settings in zip(studies, wanted, strict=True)
    ]


def chosen(plan: StudyPlan, study: optuna.Study) -> list[FrozenTrial]:
    """The trials that are confirmed: the first one, then the best; equal settings once."""
    if plan.spec.confirm is None:
        return []

    def setting(trial: FrozenTrial) -> str:
        return plan.runs_of(trial.params)[0].model_dump_json()

    trials = study.get_trials(deepcopy=False)
    first = next(trial for trial in trials if set(trial.params) == set(plan.spec.space))
    best: dict[str, FrozenTrial] = {}
    for trial in ranked(plan, finished_trials(study)):
        best.setdefault(setting(trial), trial)
    return list(({setting(first): first} | dict([*best.items()][: plan.spec.confirm.top])).values())


def ranked(plan: StudyPlan, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Finished trials of a study with one objective, the best first."""
    (direction,) = plan.spec.objectives.values()
    sign = 1 if direction == "minimize" else -1
    return sorted(trials, key=lambda trial: sign * trial.values[0])


def _confirmed(
    plan: StudyPlan, trial: FrozenTrial, runs: Sequence[Resolved], records: dict[str, Record]
) -> Confirmed:
    (name,) = plan.spec.objectives
    values, reasons = {}, []
    for run in runs:
        record = records[run.run_id]
        try:
            value = objective(record, name) if record.status == "finished" else math.nan
        except UsageError as error:  # the metric does not exist for these samples
            reasons.append(str(error))
            continue
        if math.isfinite(value):
            values[run.settings.seed] = value
        else:
            reasons.append(record.reason or f"{name} is {value}")
    return Confirmed(
        trial=trial.number,
        params=plan.spec.rounded(trial.params),
        values=values,
        run_ids=[run.run_id for run in runs],
        reason=reasons[0] if reasons else "",
    )
