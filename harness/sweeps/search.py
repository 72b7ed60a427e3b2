"""Optuna searches: a sweep file with `search` instead of seeds and axes alone. Floor 9.

Every cell of the file (its axes multiplied out) is one study, which a `space` of its own may widen; every trial of a study is one run
for each seed, under its run id like any other: trials of the same options share it, an interrupted one resumes, and `harness report`
shows all. Trial 0 is the method's defaults, as far as they lie in the space. The study itself is in a database, which `optuna-dashboard`
reads and processes share. A trial is judged on the evaluation noise, so that the best of many looks a little better than it is: report
a winner from seeds that its search has not used.

    search:
      trials: 8
      objectives: {fid: minimize}                   # metrics, or latency, macs, nfe, training_flops; several make a Pareto front
      space: {options.lr: {low: 3.0e-4, high: 3.0e-2, log: true}, options.heads: [shared, per_step]}
      sampler: tpe                                  # or random
      prune: false                                  # stop runs whose curve is below the median of those before
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import sqlalchemy as sa
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.errors import Busy, RunFailed, UsageError, unknown
from harness.files import digest
from harness.methods import METHODS
from harness.metrics.evaluator import metrics_of, milestone_metrics
from harness.provenance import capture_environment
from harness.records import Record
from harness.runs.config import RunConfig, explain, parse_config
from harness.runs.database import CONNECTION, database_url, is_there, patiently, storage_of, without_password
from harness.runs.leases import leases_of
from harness.runs.log import Report, silent
from harness.runs.resolve import resolve
from harness.runs.run import Run
from harness.sweeps.sweep import expand

COSTS: dict[str, Callable[[Any], float]] = {
    "latency": lambda cost: cost.latency.ratio, "macs": lambda cost: cost.macs_per_sample, "nfe": lambda cost: cost.nfe,
    "training_flops": lambda cost: cost.training.whole_flops if cost.training else 0.0,
}  # fmt: skip
"""What of a record's cost can be an objective."""
MOST_TRIED = 32
"""Whole numbers of a range that are tried out beforehand."""


class Range(BaseModel):
    """Numbers from low to high, whole ones if both are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    def distribution(self) -> BaseDistribution:
        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high, log=self.log, step=int(self.step or 1))
        return FloatDistribution(float(self.low), float(self.high), log=self.log, step=self.step)


class SearchSpec(BaseModel):
    """What a sweep file may say under `search`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trials: int = Field(ge=1)
    objectives: dict[str, Literal["minimize", "maximize"]] = Field(min_length=1)
    space: dict[str, Range | list[Any]] = Field(min_length=1)
    sampler: Literal["tpe", "random"] = "tpe"
    seed: int = 0
    prune: bool = False

    def distributions(self) -> dict[str, BaseDistribution]:
        return {name: CategoricalDistribution(of) if isinstance(of, list) else of.distribution() for name, of in self.space.items()}

    def at(self, number: int) -> BaseSampler:
        """The sampler of a trial; each has a seed of its own, whichever process asks."""
        seed = self.seed + number
        return RandomSampler(seed) if self.sampler == "random" else TPESampler(seed=seed, n_startup_trials=5, constant_liar=True)


@dataclass(frozen=True)
class Search:
    """One study that is to be made.

    Attributes:
        name: of the study; it holds a digest of all that trials have in common.
        configs: the runs of a trial before the space's values are put in, one a seed.
    """

    name: str
    configs: tuple[RunConfig, ...]
    spec: SearchSpec

    def trial(self, params: dict[str, Any]) -> list[RunConfig]:
        """The runs of a trial. Raises UsageError for values that do not fit."""
        options = {name.removeprefix("options."): value for name, value in params.items() if name.startswith("options.")}
        fields = {name: value for name, value in params.items() if not name.startswith("options.")}
        return [
            parse_config({**config.model_dump(exclude_unset=True), **fields, "options": {**config.options, **options}})
            for config in self.configs
        ]

    def defaults(self) -> dict[str, Any]:
        """The method's own values for the space, as far as they lie in it."""
        config = self.configs[0]
        known = METHODS[config.method].Config(**config.options).model_dump()
        known = {f"options.{name}": value for name, value in known.items()} | config.model_dump()
        inside = {}
        for name, of in self.spec.distributions().items():
            try:
                if of._contains(of.to_internal_repr(known[name])):
                    inside[name] = known[name]
            except (KeyError, ValueError, TypeError):
                continue
        return inside


def searches(content: dict[str, Any], where: str, results: Path, device: torch.device) -> list[Search]:
    """The studies of a sweep file that has `search`; the space's choices are tried out before anything is run.

    Raises UsageError for what is unknown or does not fit.
    """
    cells = content.get("cells") or [{}]
    if any(not isinstance(cell, dict) for cell in cells):
        raise UsageError(f"{where}: each of cells should be a mapping from names to values")
    return [search for cell in cells for search in _searches_of(cell, content, where, results, device)]


def _searches_of(cell: dict[str, Any], content: dict[str, Any], where: str, results: Path, device: torch.device) -> list[Search]:
    """The studies of one cell."""
    said, cell = content["search"], dict(cell)
    try:
        if isinstance(said, dict) and (own := cell.pop("space", {})):
            said = {**said, "space": {**said.get("space", {}), **own}}
        spec = SearchSpec.model_validate(said)
        corners = _corners(spec)
        spec.distributions()
    except ValidationError as error:
        raise explain(error, f"{where}: search", list(SearchSpec.model_fields)) from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{where}: search: space: {error}") from error
    groups: dict[str, list[RunConfig]] = {}
    for config in expand({**{key: value for key, value in content.items() if key != "search"}, "cells": [cell]}, where):
        groups.setdefault(config.model_dump_json(exclude={"seed"}), []).append(config)
    found = []
    for alike, configs in groups.items():
        study = f"{configs[0].method}-{configs[0].num_steps}-{digest([alike, spec.model_dump(mode='json', exclude={'trials'})])[:10]}"
        search = Search(study, tuple(configs), spec)
        for number, corner in enumerate(corners):
            config = search.trial(corner)[0]
            if number and "budget" not in corner:  # counted once
                config = config.model_copy(update={"budget": "steps=1"})
            task = resolve(config, results=results, device=device).task
        curve = milestone_metrics(task)
        known = {*metrics_of(task), *COSTS}
        for name in spec.objectives:
            if name not in known:
                raise unknown("objective", name, sorted(known))
        if spec.prune and len(configs) > 1:
            raise UsageError(f"{where}: search: prune looks at the curve of one run, but a trial has {len(configs)} seeds: give one")
        if spec.prune and (len(spec.objectives) > 1 or not spec.objectives.keys() <= set(curve)):
            raise UsageError(f"{where}: search: prune looks at the curve of one objective, which must be one of: {', '.join(curve)}")
        found.append(search)
    return found


def _corners(spec: SearchSpec) -> list[dict[str, Any]]:
    """Points that show whether values fit: all lowest, all highest, and each further choice or whole number beside the lowest others."""
    values: dict[str, list[Any]] = {}
    for name, of in spec.space.items():
        if isinstance(of, list):
            values[name] = of
        elif isinstance(of.low, int) and isinstance(of.high, int) and not of.log:
            values[name] = [*range(of.low, of.high + 1, int(of.step or 1))][:MOST_TRIED]
        else:
            values[name] = [of.low, of.high]
    low, high = ({name: found[place] for name, found in values.items()} for place in (0, -1))
    return [low, high, *({**low, name: value} for name, found in values.items() for value in found[1:])]


def open_study(search: Search, storage: str) -> optuna.Study:
    """The study in a database, made if it is not there. Raises UsageError if the database cannot be opened."""
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4) if search.spec.prune else optuna.pruners.NopPruner()
    try:
        return optuna.create_study(storage=_database(storage), study_name=search.name, directions=list(search.spec.objectives.values()),
                                   pruner=pruner, load_if_exists=True)  # fmt: skip
    except Exception as error:
        raise UsageError(f"cannot open the study's database {without_password(storage)}: {type(error).__name__}: {error}") from error


def known_study(search: Search, storage: str) -> optuna.Study | None:
    """The study, if its database has it; nothing is made. Raises UsageError if the database cannot be read."""
    if not is_there(storage):
        return None
    try:
        if not sa.inspect(sa.create_engine(database_url(storage))).has_table("studies"):
            return None
        return optuna.load_study(study_name=search.name, storage=_database(storage))
    except KeyError:
        return None
    except sa.exc.SQLAlchemyError as error:
        raise UsageError(f"cannot read the database {without_password(storage)}: {type(error).__name__}") from error


def _database(storage: str) -> optuna.storages.RDBStorage:
    url = database_url(storage)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    connection = {"pool_pre_ping": True, "connect_args": CONNECTION[url.get_backend_name()]}
    return optuna.storages.RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=connection)


@dataclass
class Searcher:
    """Makes the trials of searches; several workers may do so side by side."""

    results: Path
    device: torch.device
    storage: str = ""
    report: Report = silent
    reuse: bool = False
    said: Callable[[str], None] = lambda text: None

    def make(self, search: Search) -> optuna.Study:
        """All trials of a study; those that nobody is at are taken up again."""
        with leases_of(self.results, self.storage).holding("study-tables", wait=True):  # which two must not make at once
            study = open_study(search, storage_of(self.results, self.storage))
        with self._alone(search):
            running = patiently(lambda: study.get_trials(states=[TrialState.RUNNING]))  # nobody is between asking and all values now
        code = capture_environment(self.device).code
        others = {trial.user_attrs.get("code") for trial in study.get_trials(deepcopy=False)} - {code, None}
        if others and not self.reuse:
            raise UsageError(f"study {search.name} was begun by other code: --reuse goes on with it, another --storage begins anew")
        for frozen in running:
            if set(frozen.params) != set(search.spec.space):  # its process ended before it was complete
                self._tell(search, study, frozen, state=TrialState.FAIL)
            else:
                self._finish(search, study, optuna.trial.Trial(study, frozen._trial_id), wait=False)
        while (trial := patiently(lambda: self._next(search, study, code))) is not None:
            while not self._finish(search, study, trial, wait=True):
                pass  # another worker had taken its run over
        return study

    def _alone(self, search: Search) -> AbstractContextManager[Any]:
        """Among all workers, for what must not be done twice."""
        return leases_of(self.results, self.storage).holding(f"study-{search.name}", wait=True)

    def _next(self, search: Search, study: optuna.Study, code: str) -> optuna.trial.Trial | None:
        """The next trial with all its values, or None where there are enough."""
        with self._alone(search):
            number = len(study.get_trials(deepcopy=False))
            if number >= search.spec.trials:
                return None
            if number == 0:
                study.enqueue_trial(search.defaults())
            study.sampler = search.spec.at(number)
            with warnings.catch_warnings(action="ignore"):  # constant_liar is experimental for Optuna, and stays inside here
                trial = study.ask(search.spec.distributions())
            trial.set_user_attr("code", code)
            return trial

    def _finish(self, search: Search, study: optuna.Study, trial: optuna.trial.Trial, wait: bool) -> bool:
        """Makes the runs of a trial and tells what they gave; whether nobody else is at them."""
        records, pruned = [], False

        def judge(part: float, quality: dict[str, float]) -> None:
            nonlocal pruned
            (objective,) = search.spec.objectives
            if objective in quality:
                with warnings.catch_warnings(action="ignore"):  # a resumed run tells a point again
                    patiently(lambda: trial.report(quality[objective], step=round(part * 1000)))
                pruned = patiently(trial.should_prune)
                if pruned:
                    raise RunFailed(f"pruned: after {part:.3g} of the budget its {objective} was worse than the median of other trials")

        for config in search.trial(trial.params):
            try:
                resolved = resolve(config, results=self.results, device=self.device)
            except UsageError as error:  # values that fit alone, but not together
                self.said(f"{search.name} trial {trial.number}: {error}")
                self._tell(search, study, trial, state=TrialState.FAIL)
                return True
            self.said(f"{search.name} trial {trial.number}, {resolved.run_id} seed {config.seed}: {_shown(trial.params)}")
            run = Run(resolved, self.results, self.device, self.report, judge if search.spec.prune else None, self.storage)
            try:
                records.append(run.execute(self.reuse, wait))
            except Busy:
                return False
            except RunFailed as error:
                self.said(f"{search.name} trial {trial.number}: {error}")
                self._tell(search, study, trial, state=TrialState.PRUNED if pruned else TrialState.FAIL)
                return True
        values = [sum(objective(record, name) for record in records) / len(records) for name in search.spec.objectives]
        self._tell(search, study, trial, values, run_ids=[record.run_id for record in records])
        return True

    def _tell(self, search: Search, study: optuna.Study, trial: optuna.trial.Trial | FrozenTrial, values: list[float] | None = None,
              state: TrialState | None = None, run_ids: Sequence[str] = ()) -> None:  # fmt: skip
        """Notes how a trial ended, unless another worker has."""

        def tell() -> None:
            with self._alone(search):
                if study.get_trials(deepcopy=False)[trial.number].state.is_finished():
                    return
                if isinstance(trial, optuna.trial.Trial) and run_ids:
                    trial.set_user_attr("run_ids", list(run_ids))
                study.tell(trial.number, values, state)

        patiently(tell)


def objective(record: Record, name: str) -> float:
    """A record's value of an objective: a metric's mean or a cost. Raises UsageError if it has none of that name."""
    if name in COSTS and record.cost is not None:
        return COSTS[name](record.cost)
    if name in record.metrics:
        return record.metrics[name].mean
    raise unknown("objective", name, [*record.metrics, *COSTS])


def _shown(params: dict[str, Any]) -> str:
    return ", ".join(f"{name.removeprefix('options.')} {value:.4g}" if isinstance(value, float) else
                     f"{name.removeprefix('options.')} {value}" for name, value in params.items())  # fmt: skip


def lines_of(search: Search, study: optuna.Study) -> list[dict[str, Any]]:
    """A table of a study's trials: number, state, values of the space, objectives, and whether it is best (or on the Pareto front)."""
    best = {trial.number for trial in study.best_trials} if any(_complete(study.get_trials(deepcopy=False))) else set()
    lines = []
    for trial in study.get_trials(deepcopy=False):
        values = dict(zip(search.spec.objectives, trial.values or [], strict=False))
        lines.append({"study": search.name, "trial": trial.number, "state": trial.state.name.lower(), **trial.params, **values,
                      "best": trial.number in best})  # fmt: skip
    return lines


def _complete(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if trial.state == TrialState.COMPLETE]
