"""Studies: what a sweep file with `search` asks for.

Every cell of the file (its axes multiplied out) is one study, and may add to its `space`. Every
trial of a study is one run for each seed.

    search:
      trials: 8
      objectives: {fid: minimize}     # metrics, latency, macs, nfe, training_flops; or several
      space: {options.lr: {low: 3.0e-4, high: 3.0e-2, log: true}, options.heads: [shared, per_step]}
      sampler: tpe                    # or random
      prune: false                    # stop runs that are worse than the median of finished ones
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.errors import UsageError, unknown
from harness.methods import METHODS
from harness.metrics.evaluator import metrics_of, milestone_metrics
from harness.records import Record
from harness.runs.config import RunConfig, explain, parse_config
from harness.runs.identity import study_name
from harness.runs.resolve import resolve
from harness.sweeps.sweep import expand

COSTS: dict[str, Callable[[Any], float]] = {
    "latency": lambda cost: cost.latency.ratio,
    "macs": lambda cost: cost.macs_per_sample,
    "nfe": lambda cost: cost.nfe,
    "training_flops": lambda cost: cost.training.whole_flops if cost.training else 0.0,
}
"""Objectives that come from a record's cost."""
MOST_TRIED = 32
"""At most so many whole numbers of a range are checked before the first run."""


class Range(BaseModel):
    """Numbers from low to high; whole ones if both are whole."""

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
    """The `search` of a sweep file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trials: int = Field(ge=1)
    objectives: dict[str, Literal["minimize", "maximize"]] = Field(min_length=1)
    space: dict[str, Range | list[Any]] = Field(min_length=1)
    sampler: Literal["tpe", "random"] = "tpe"
    seed: int = 0
    prune: bool = False

    def distributions(self) -> dict[str, BaseDistribution]:
        return {
            name: CategoricalDistribution(of) if isinstance(of, list) else of.distribution()
            for name, of in self.space.items()
        }

    def sampler_of(self, number: int) -> BaseSampler:
        """The sampler of a trial, seeded by its number: a search proposes the same after a stop."""
        seed = self.seed + number
        return (
            RandomSampler(seed)
            if self.sampler == "random"
            else TPESampler(seed=seed, n_startup_trials=5, constant_liar=True)
        )


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
        spec = _spec_of(cell, content["search"], where)
        rest = {key: value for key, value in content.items() if key != "search"}
        own = {key: value for key, value in cell.items() if key != "space"}
        groups: dict[str, list[RunConfig]] = {}
        for config in expand({**rest, "cells": [own]}, where):
            groups.setdefault(config.model_dump_json(exclude={"seed"}), []).append(config)
        for configs in groups.values():
            name = study_name(configs, spec.model_dump(mode="json", exclude={"trials"}))
            plan = StudyPlan(name, tuple(configs), spec)
            _check(plan, where, results, device)
            plans.append(plan)
    return plans


def _spec_of(cell: dict[str, Any], search: Any, where: str) -> SearchSpec:
    """The search of one cell, whose own space is added to the file's."""
    try:
        if isinstance(search, dict) and (own := cell.get("space", {})):
            search = {**search, "space": {**search.get("space", {}), **own}}
        spec = SearchSpec.model_validate(search)
        spec.distributions()
    except ValidationError as error:
        raise explain(error, f"{where}: search", list(SearchSpec.model_fields)) from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{where}: search: space: {error}") from error
    return spec


def _check(plan: StudyPlan, where: str, results: Path, device: torch.device) -> None:
    """Raises UsageError for values, objectives and pruning that do not fit."""
    spec = plan.spec
    for number, corner in enumerate(_corners(spec)):
        config = plan.runs_of(corner)[0]
        if number and "budget" not in corner:  # the budget is settled once
            config = config.model_copy(update={"budget": "steps=1"})
        task = resolve(config, results=results, device=device).task
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


def _corners(spec: SearchSpec) -> list[dict[str, Any]]:
    """Points to check: all lowest, all highest, and each other choice with the rest lowest."""
    values: dict[str, list[Any]] = {}
    for name, of in spec.space.items():
        if isinstance(of, list):
            values[name] = of
        elif isinstance(of.low, int) and isinstance(of.high, int) and not of.log:
            values[name] = [*range(of.low, of.high + 1, int(of.step or 1))][:MOST_TRIED]
        else:
            values[name] = [of.low, of.high]
    low, high = ({name: found[place] for name, found in values.items()} for place in (0, -1))
    return [
        low,
        high,
        *({**low, name: value} for name, found in values.items() for value in found[1:]),
    ]


def objective(record: Record, name: str) -> float:
    """A metric's mean or a cost. Raises UsageError if the record lacks it."""
    if name in COSTS and record.cost is not None:
        return COSTS[name](record.cost)
    if name in record.metrics:
        return record.metrics[name].mean
    raise unknown("objective", name, [*record.metrics, *COSTS])
