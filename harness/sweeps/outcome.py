"""What a search found: every trial, the confirmation, and the winner's options.

It lies in `<results>/searches/<study>.json`, which is committed; `harness report --publish` makes a
page of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from harness.errors import UsageError
from harness.files import inside
from harness.methods import METHODS
from harness.records import Name
from harness.runs.resolve import options_on
from harness.seals import read_sealed_json, write_sealed_json
from harness.sweeps.confirm import Confirmed, ranked
from harness.sweeps.database import finished_trials, lines_of
from harness.sweeps.study import StudyPlan
from harness.tasks import load_task

FOLDER = "searches"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class TrialLine(_Part):
    """One trial."""

    trial: int
    state: str
    """complete, pruned, failed (its reason says why), running or fail (its process died)."""
    params: dict[str, Any]
    values: dict[str, float]
    """Objectives; the last one measured of a pruned trial, none of a failed one."""
    best: bool
    """Whether it is the best, or on the front of several objectives."""
    run_ids: list[str]
    reason: str = ""


class Outcome(_Part):
    """One study."""

    study: Name
    task: Name
    method: Name
    num_steps: int
    budget: str
    seeds: list[int]
    objectives: dict[str, str]
    space: dict[str, Any]
    asked: int
    """Trials that the file asks for."""
    trials: list[TrialLine]
    confirm_budget: str = ""
    confirmed: list[Confirmed]
    winner: int | None
    """The best trial of the confirmation, or of the search without one; none of several
    objectives."""
    defaults: dict[str, Any] | None
    """The winner's options that differ from its method's own."""

    @model_validator(mode="after")
    def _winner_has_a_value(self) -> Outcome:
        """A winner is one of the trials, or of the confirmed ones, and was measured."""
        if self.winner is None:
            return self
        if len(self.objectives) != 1:
            raise ValueError("only a single objective has a winner")
        name = next(iter(self.objectives))
        measured = {line.trial for line in self.trials if name in line.values}
        if self.confirmed:
            measured = {one.trial for one in self.confirmed if one.mean is not None}
        if self.winner not in measured:
            raise ValueError(f"trial {self.winner} won, but has no value")
        return self


def outcome_of(plan: StudyPlan, study: optuna.Study, confirmed: Sequence[Confirmed]) -> Outcome:
    """The outcome of a study whose trials and confirmation are made."""
    config, spec = plan.configs[0], plan.spec
    winner = winner_of(plan, study, confirmed)
    return Outcome(
        study=plan.name,
        task=load_task(config.task).spec.name,  # which may be given as a file
        method=config.method,
        num_steps=config.num_steps,
        budget=config.budget,
        seeds=[one.seed for one in plan.configs],
        objectives=dict(spec.objectives),
        space=spec.model_dump(mode="json", exclude_defaults=True)["space"],
        asked=spec.trials,
        trials=_trial_lines(plan, study),
        confirm_budget=(spec.confirm.budget or config.budget) if spec.confirm else "",
        confirmed=list(confirmed),
        winner=winner,
        defaults=None if winner is None else _options(plan, study.trials[winner].params),
    )


def winner_of(plan: StudyPlan, study: optuna.Study, confirmed: Sequence[Confirmed]) -> int | None:
    """The number of the winning trial, or None.

    It has the best mean of the confirmation; without a confirmation, the best value of the search.
    """
    if len(plan.spec.objectives) > 1:
        return None
    if plan.spec.confirm is None:
        return next((trial.number for trial in ranked(plan, finished_trials(study))), None)
    sign = 1 if "minimize" in plan.spec.objectives.values() else -1
    means = {one.trial: sign * one.mean for one in confirmed if one.mean is not None}
    return min(means, key=lambda trial: means[trial], default=None)


def _options(plan: StudyPlan, params: dict[str, Any]) -> dict[str, Any]:
    """The options of a trial that differ from its method's own defaults."""
    config = plan.runs_of(params)[0]
    found = options_on(load_task(config.task), config).model_dump(mode="json")
    plain = METHODS[config.method].Config().model_dump(mode="json")
    return {name: value for name, value in found.items() if value != plain.get(name)}


def _trial_lines(plan: StudyPlan, study: optuna.Study) -> list[TrialLine]:
    lines = []
    for line, trial in zip(lines_of(plan, study), study.get_trials(deepcopy=False), strict=True):
        lines.append(
            TrialLine(
                trial=trial.number,
                state=line["state"],
                params=plan.spec.rounded(trial.params),
                values={name: line[name] for name in plan.spec.objectives if name in line}
                if line["state"] in ("complete", "pruned")
                else {},
                best=line["best"],
                run_ids=trial.user_attrs.get("run_ids", []),
                reason=line.get("reason", ""),
            )
        )
    return lines


def write_outcome(outcome: Outcome, results: Path) -> Path:
    """Writes an outcome into a results folder."""
    path = results / FOLDER / f"{outcome.study}.json"
    write_sealed_json(path, json.loads(outcome.model_dump_json()))
    return path


def read_outcomes(results: Path) -> list[Outcome]:
    """The outcomes in a results folder, by name. Raises UsageError for a file that is none."""
    found = []
    for path in sorted((results / FOLDER).glob("*.json")):
        try:
            content = read_sealed_json(inside(path, results), required=False)
            found.append(Outcome.model_validate(content))
        except ValidationError as error:
            raise UsageError(f"{path} is no outcome of a search: delete it") from error
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{path} cannot be read: {error}; delete it and the same search writes it again"
            ) from error
    return found


def snippet(outcomes: Sequence[Outcome]) -> str:
    """The winners' options as `defaults` of task files, in YAML; "" if nothing has won."""
    parts = []
    for task, num_steps in dict.fromkeys((one.task, one.num_steps) for one in outcomes):
        lines = [
            f"  {one.method}: {_flow(one.defaults)}  # {verdict(one)}"
            for one in outcomes
            if (one.task, one.num_steps) == (task, num_steps) and one.defaults is not None
        ]
        if lines:
            parts.append("\n".join([f"# {task}, num_steps {num_steps}", "defaults:", *lines]))
    return "\n".join(parts)


def _flow(options: dict[str, Any]) -> str:
    """Options as YAML in one line."""
    return yaml.safe_dump(options, default_flow_style=True, width=10_000).strip()


def verdict(outcome: Outcome) -> str:
    """The winner's value beside that of the first trial, which has the method's own defaults."""
    if outcome.winner is None:
        return "no winner"
    (name,) = outcome.objectives
    values: dict[int, float | None] = {line.trial: line.values.get(name) for line in outcome.trials}
    runs = ""
    if outcome.confirmed:
        values = {one.trial: one.mean for one in outcome.confirmed}
        (won,) = (one for one in outcome.confirmed if one.trial == outcome.winner)
        runs = f", confirmed with seed {', '.join(map(str, won.values))}"
    first = next(iter(values))
    own = values[first]
    beside = "failed" if own is None else f"{own:.4g}"
    best = f"trial {outcome.winner}: {name} {values[outcome.winner]:.4g}{runs}"
    return f"{best}; trial {first}: {beside}"
