"""Searches by Optuna: the driver asks for trials and tells their values, children make the runs.

Trial 0 has the method's defaults, as far as they lie in the space. A trial's runs have run ids like
any others. So trials with equal options share runs, and interrupted runs resume.

Optuna's samplers ignore failed trials and keep proposing their neighbourhood. So a trial whose run
fails gets a bad value, with the reason as its attribute.

Trials are judged on noise and seeds that no table uses. The best of many still looks better than it
is, so `harness.sweeps.confirm` runs the best anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from harness.errors import UsageError
from harness.provenance import capture_environment
from harness.records import Record
from harness.runs.config import RunConfig
from harness.runs.finished import run_folder
from harness.runs.locks import held
from harness.runs.resolve import Resolved, resolve
from harness.runs.run import Run
from harness.sweeps.child import (
    MILESTONES_FILE,
    PRUNED,
    UNTRACKED,
    Pruning,
    Tracking,
    job_of,
    milestones,
)
from harness.sweeps.database import ANSWERED, finished_trials, open_study, tell, writable
from harness.sweeps.driver import Driver
from harness.sweeps.study import StudyPlan, objective
from harness.sweeps.sweep import record_of

UNSEEN = 1e20
"""The bad value of a trial that fails before any has finished."""
PRUNED_AFTER = 4
"""Finished trials of a study before runs are pruned."""


@dataclass
class Trial:
    """A trial whose runs are being made, one after the other.

    Attributes:
        number: Optuna's.
        params: the values of the space.
        waiting: the runs that are still to be made.
        records: of the runs that are finished.
        label: what lines about it begin with.
    """

    number: int
    params: dict[str, Any]
    label: str
    waiting: list[tuple[RunConfig, Resolved]] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)


@dataclass
class Searcher:
    """Makes the trials of one study.

    Args:
        driver: carries the runs out.
        reuse: take finished records, and go on with a study, of other code.
        say: prints a line.
        tracking: what follows the runs of the trials.
    """

    plan: StudyPlan
    results: Path
    device: torch.device
    driver: Driver[Trial]
    reuse: bool = False
    say: Callable[[str], None] = print
    tracking: Tracking = UNTRACKED
    study: optuna.Study = field(init=False)
    code: str = field(init=False)

    def make(self) -> optuna.Study:
        """Makes all trials; those that an earlier driver left unfinished come first.

        Raises:
            Busy: if another process works on this study.
            UsageError: if other code began it, or a run was refused.
        """
        with held(self.results, f"study-{self.plan.name}"), writable(self.results), self.driver:
            self.study = open_study(self.plan, self.results)
            self.code = capture_environment(self.device).code
            self._refuse_other_code()
            self._take_up()
            missing = self.plan.spec.trials - len(self._trials(*ANSWERED)) - len(self.driver.flying)
            while missing > 0 or self.driver.flying:
                if missing > 0 and not self.driver.full:
                    missing -= 1
                    self._begin(self._ask(), anew=True)
                else:
                    self._land(*self.driver.next())
            return self.study

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _refuse_other_code(self) -> None:
        others = {trial.user_attrs.get("code") for trial in self._trials()} - {self.code, None}
        if others and not self.reuse:
            raise UsageError(
                f"study {self.plan.name} was begun by other code: --reuse goes on with it, "
                "another --results begins anew"
            )

    def _take_up(self) -> None:
        """Restarts the trials that a dead driver left."""
        for trial in self._trials(TrialState.RUNNING):
            while self.driver.full:
                self._land(*self.driver.next())
            self._begin(self._completed(trial))

    def _ask(self) -> FrozenTrial:
        """The next trial, which has its values before it begins: a dead driver leaves no half."""
        trials = self._trials()
        if all(trial.state != TrialState.WAITING for trial in trials):
            values = self._drawn(trials)
            self.study.enqueue_trial(values, user_attrs={"code": self.code})
        return self._completed(self._trials()[self.study.ask().number])

    def _drawn(self, trials: Sequence[FrozenTrial]) -> dict[str, Any]:
        """The values of the trial after these, which a copy of the study in memory draws."""
        with warnings.catch_warnings(action="ignore"):  # Optuna calls constant_liar experimental
            sampler = self.plan.spec.sampler_of(len(trials))
        copy = optuna.create_study(directions=self.study.directions, sampler=sampler)
        copy.add_trials(trials)
        if not trials:
            copy.enqueue_trial(self.plan.defaults())
        return copy.ask(self.plan.spec.distributions()).params

    def _completed(self, trial: FrozenTrial) -> FrozenTrial:
        """A trial with all its values written."""
        handle = self._handle(trial)
        for name, distribution in self.plan.spec.distributions().items():
            handle._suggest(name, distribution)
        return self._trials()[trial.number]

    def _runs_of(self, params: dict[str, Any]) -> list[tuple[RunConfig, Resolved]]:
        return [
            (config, resolve(config, results=self.results, device=self.device))
            for config in self.plan.runs_of(params)
        ]

    def _milestones_file(self, resolved: Resolved) -> Path:
        return run_folder(resolved, self.results) / MILESTONES_FILE

    def _begin(self, frozen: FrozenTrial, anew: bool = False) -> None:
        """Starts a trial; one that is made anew forgets the milestones of equal runs."""
        params = self.plan.spec.rounded(frozen.params)
        trial = Trial(frozen.number, params, f"{self.plan.name} trial {frozen.number}")
        try:
            trial.waiting = self._runs_of(params)
            run_ids = [resolved.run_id for _, resolved in trial.waiting]
            self._handle(trial).set_user_attr("run_ids", run_ids)
            if anew and self.plan.spec.prune:
                self._milestones_file(trial.waiting[0][1]).unlink(missing_ok=True)
        except UsageError as error:  # values that fit alone, but not together
            self._tell_failure(trial, str(error))
            return
        self._go_on(trial)

    def _go_on(self, trial: Trial) -> None:
        """Starts the next missing run of a trial, or tells the trial's values if none is left."""
        while trial.waiting:
            config, resolved = trial.waiting[0]
            run = Run(resolved, self.results, self.device)
            record = run.finished_record(self.reuse)
            if record is None:
                self.say(
                    f"{trial.label}, {resolved.run_id} seed {config.seed}: {shown(trial.params)}"
                )
                name = trial.label if self.driver.workers > 1 else ""
                job = job_of(
                    config,
                    resolved,
                    self.results,
                    self.device,
                    self.reuse,
                    name,
                    self._pruning(),
                    self.tracking,
                )
                self.driver.start(trial, job)
                return
            trial.records.append(record)
            trial.waiting.pop(0)
        self._tell(trial)

    def _land(self, trial: Trial, died: str) -> None:
        """Takes the record of a trial's run that has ended."""
        _, resolved = trial.waiting.pop(0)
        record = record_of(Run(resolved, self.results, self.device), died)
        if record.status == "finished":
            trial.records.append(record)
            self._go_on(trial)
        elif record.reason.startswith(PRUNED):
            self.say(f"{trial.label}: {record.reason}")
            self._report(trial, milestones(self._milestones_file(resolved)))
            tell(self.study, trial.number, TrialState.PRUNED)
        else:
            self._tell_failure(trial, record.reason, died)

    def _tell(self, trial: Trial) -> None:
        """Tells the means over a trial's runs."""
        objectives, records = self.plan.spec.objectives, trial.records
        try:
            values = [
                sum(objective(record, name) for record in records) / len(records)
                for name in objectives
            ]
        except UsageError as error:  # the metric does not exist for these samples
            self._tell_failure(trial, str(error))
            return
        if not np.isfinite(values).all():
            self._tell_failure(trial, f"{', '.join(objectives)}: {values}: not finite")
            return
        cost = records[0].cost
        if self.plan.spec.prune and cost is not None and cost.training is not None:
            (name,), steps = objectives, cost.training.steps
            curve = {
                round(1000 * point.step / steps): point.quality[name]
                for point in records[0].milestones
                if name in point.quality
            }
            self._report(trial, curve)
        tell(self.study, trial.number, TrialState.COMPLETE, values)

    def _tell_failure(self, trial: Trial, reason: str, died: str = "") -> None:
        """Tells a bad value and the reason. A trial whose process died fails: it has no answer."""
        self.say(f"{trial.label}: {reason}")
        self._handle(trial).set_user_attr("reason", reason)
        if died:
            tell(self.study, trial.number, TrialState.FAIL)
            return
        seen = [found.values for found in finished_trials(self.study)]
        directions = self.plan.spec.objectives.values()
        values = [
            bad_value(direction, [values[place] for values in seen])
            for place, direction in enumerate(directions)
        ]
        tell(self.study, trial.number, TrialState.COMPLETE, values)

    def _handle(self, trial: Trial | FrozenTrial) -> optuna.trial.Trial:
        return optuna.trial.Trial(self.study, self._trials()[trial.number]._trial_id)

    def _report(self, trial: Trial, points: dict[int, float]) -> None:
        with warnings.catch_warnings(action="ignore"):  # points are reported twice after a stop
            for place, value in points.items():
                self._handle(trial).report(value, step=place)

    def _pruning(self) -> Pruning | None:
        """The pruning of a run that starts now: medians of the finished trials by milestone."""
        if not self.plan.spec.prune:
            return None
        ((name, direction),) = self.plan.spec.objectives.items()
        curves = [trial.intermediate_values for trial in finished_trials(self.study)]
        points = {
            place: [curve[place] for curve in curves if place in curve]
            for place in {place for curve in curves for place in curve}
            if place >= 1000 * self.plan.spec.prune_from
        }
        medians = {
            place: float(np.median(values))
            for place, values in points.items()
            if len(curves) >= PRUNED_AFTER
        }
        return Pruning(objective=name, sign=1 if direction == "minimize" else -1, medians=medians)


def bad_value(direction: str, seen: Sequence[float]) -> float:
    """The value of a failed trial: ten times the worst seen, or `UNSEEN` before one is seen.

    For a worst value w of any sign it is w + 9 |w| for `minimize`, w - 9 |w| for `maximize`.
    """
    sign = 1 if direction == "minimize" else -1
    worst = max((sign * value for value in seen), default=0.0)
    return sign * (worst + (9 * abs(worst) or UNSEEN))


def shown(params: dict[str, Any]) -> str:
    """The values of a trial in a line."""
    texts = {
        name: f"{value:.4g}" if isinstance(value, float) else str(value)
        for name, value in params.items()
    }
    return ", ".join(f"{name.removeprefix('options.')} {text}" for name, text in texts.items())
