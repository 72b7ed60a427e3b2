"""Studies: what a sweep file with `search` asks for (`harness.sweeps.spec` has its keys).

Every cell of the file (its axes multiplied out) is one study, and may add to its `space`. Every
trial of a study is one run for each seed.

Searches have noise and seeds that no table uses: their runs have purpose "tune".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.errors import UsageError, standing_in, unknown
from harness.methods import METHODS
from harness.metrics.available import metrics_of, milestone_metrics
from harness.records import Record
from harness.runs.budgets import parse_budget
from harness.runs.config import FIRST_TUNING_SEED, RunConfig, parse_config
from harness.runs.identity import study_name
from harness.runs.resolve import resolve
from harness.sweeps.spec import Range, SearchSpec, spec_of
from harness.sweeps.sweep import expand
from harness.tasks import Task

COSTS: dict[str, Callable[[Any], float]] = {
    "latency": lambda cost: cost.latency.ratio,
    "macs": lambda cost: cost.macs_per_sample,
    "nfe": lambda cost: cost.nfe,
    "training_flops": lambda cost: cost.training.whole_flops if cost.training else 0.0,
}
"""Objectives that come from a record's cost."""
MOST_TRIED = 32
"""At most so many whole numbers of a range are checked before the first run, the last one too."""


@dataclass(frozen=True)
class StudyPlan:
    """One study.

    Attributes:
        name: holds a digest of everything that the trials have in common.
        configs: the runs of a trial without the values of the space, one a seed.
    """

    name: str
    configs: tuple[RunConfig, ...]
    spec: SearchSpec

    def runs_of(self, params: dict[str, Any]) -> list[RunConfig]:
        """The runs of a trial with these values. Raises UsageError for values that do not fit."""
        params = self.spec.rounded(params)
        options = {
            name.removeprefix("options."): value
            for name, value in params.items()
            if name.startswith("options.")
        }
        fields = {name: value for name, value in params.items() if not name.startswith("options.")}
        return [
            parse_config(
                {
                    **config.model_dump(exclude_unset=True),
                    **fields,
                    "options": {**config.options, **options},
                }
            )
            for config in self.configs
        ]

    def confirmations_of(self, params: dict[str, Any]) -> list[RunConfig]:
        """The runs that confirm a trial with these values, one a seed of `confirm`."""
        confirm = self.spec.confirm
        if confirm is None:
            return []
        config = self.runs_of(params)[0]
        budget = confirm.budget or config.budget
        return [
            config.model_copy(update={"seed": seed, "budget": budget}) for seed in confirm.seeds
        ]

    def defaults(self) -> dict[str, Any]:
        """The method's own values for the space, as far as they lie in it.

        A task's defaults do not count here, so that every method starts from its own file.
        """
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


def study_plans(
    content: dict[str, Any], where: str, results: Path, device: torch.device
) -> list[StudyPlan]:
    """The studies of a sweep file that has `search`, their spaces checked before anything runs.

    Args:
        where: names the file in errors.

    Raises UsageError for unknown names and values that do not fit.
    """
    cells = content.get("cells") or [{}]
    if any(not isinstance(cell, dict) for cell in cells):
        raise UsageError(f"{where}: each of cells should be a mapping from names to values")
    plans = []
    for cell in cells:
        own = {key: value for key, value in cell.items() if key != "space"}
        groups: dict[str, list[RunConfig]] = {}
        for config in expand(_for_tuning({**content, "cells": [own]}), where):
            if config.purpose != "tune":
                raise UsageError(f"{where}: every trial has purpose tune: leave purpose out")
            groups.setdefault(config.model_dump_json(exclude={"seed"}), []).append(config)
        for configs in groups.values():
            spec = spec_of(content["search"], cell.get("space", {}), configs[0].method, where)
            plan = StudyPlan(study_name(configs, spec.of_trials), tuple(configs), spec)
            with standing_in(where):
                _check(plan, where, results, device)
            plans.append(plan)
    return plans


def _for_tuning(content: dict[str, Any]) -> dict[str, Any]:
    """A sweep file without its search, on tuning seeds and noise."""
    rest = {key: value for key, value in content.items() if key != "search"}
    base = rest.get("base", {})
    if isinstance(base, dict):
        rest["base"] = {"purpose": "tune", **base}
    return {"seeds": [FIRST_TUNING_SEED], **rest}


def _check(plan: StudyPlan, where: str, results: Path, device: torch.device) -> None:
    """Raises UsageError for values, objectives, pruning and seeds that do not fit."""
    spec, task = plan.spec, _checked_task(plan, results, device)
    curve, known = milestone_metrics(task), {*metrics_of(task), *COSTS}
    for name in spec.objectives:
        if name not in known:
            raise unknown("objective", name, sorted(known))
    if spec.prune and len(plan.configs) > 1:
        raise UsageError(
            f"{where}: search: prune needs trials of one run, "
            f"but a trial has {len(plan.configs)} seeds: give one"
        )
    if spec.prune and (len(spec.objectives) > 1 or not spec.objectives.keys() <= set(curve)):
        raise UsageError(
            f"{where}: search: prune needs a single objective, which must be one of: "
            f"{', '.join(curve)}"
        )
    used = {config.seed for config in plan.configs}
    if spec.confirm is not None and (twice := used & {*spec.confirm.seeds}):
        raise UsageError(
            f"{where}: search: confirm: seed {min(twice)} has chosen the best trials: give another"
        )


def _checked_task(plan: StudyPlan, results: Path, device: torch.device) -> Task:
    """The study's task, once every value of the space is seen to fit.

    A value fits if it does with the defaults, or with all lowest or all highest values of the
    others. Raises UsageError for the first that does not.
    """
    values = {name: _tried(of) for name, of in plan.spec.space.items()}
    low, high = ({name: found[place] for name, found in values.items()} for place in (0, -1))
    start = low | plan.defaults()

    def problem(point: dict[str, Any]) -> UsageError | None:
        settled = {} if "budget" in point else {"budget": "steps=1"}  # the budget is settled once
        try:
            resolve(plan.runs_of({**point, **settled})[0], results=results, device=device)
        except UsageError as error:
            return error
        return None

    for name, value in ((name, value) for name, found in values.items() for value in found):
        first = problem({**start, name: value})
        if first and all(problem({**rest, name: value}) for rest in (low, high)):
            raise first
    task = resolve(plan.runs_of(start)[0], results=results, device=device).task
    for config in plan.confirmations_of(start):
        if config.budget not in task.spec.budgets:
            parse_budget(config.budget, task)
        resolve(config.model_copy(update={"budget": "steps=1"}), results=results, device=device)
    return task


def _tried(of: Range | list[Any]) -> list[Any]:
    """The values of a range or of choices that are checked before the first run."""
    if isinstance(of, list):
        return of
    if isinstance(of.low, int) and isinstance(of.high, int) and not of.log:
        whole = range(of.low, of.high + 1, int(of.step or 1))
        return [*whole[: MOST_TRIED - 1], *whole[MOST_TRIED - 1 :][-1:]]
    return [of.low, of.high]


def objective(record: Record, name: str) -> float:
    """A metric's mean or a cost. Raises UsageError if the record lacks it."""
    if name in COSTS and record.cost is not None:
        return COSTS[name](record.cost)
    if name in record.metrics:
        return record.metrics[name].mean
    raise unknown("objective", name, [*record.metrics, *COSTS])
