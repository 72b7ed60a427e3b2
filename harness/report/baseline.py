"""Baseline files: the numbers of runs that later code must reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from harness.errors import UsageError
from harness.methods import METHODS
from harness.records import Environment, Record
from harness.report.labels import counted, label
from harness.report.rows import HEADLINES, present_last, trains
from harness.runs.config import RunConfig, parse_config
from harness.runs.external import from_outside
from harness.runs.identity import key_of_record, row_key
from harness.seals import read_sealed_json, write_sealed_json
from harness.tasks import load_task, task_names


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Quality(_Part):
    """A metric's mean over noise sets, with the hash of its identity."""

    name: str
    value: float
    lower_is_better: bool
    identity: str


class Entry(_Part):
    """The numbers of one run."""

    task: str
    label: str
    row: str
    """Digest of method and settings without the seed."""
    config: dict[str, Any]
    """As `harness run --config` takes it; empty for a run that starts from another one."""
    exact: dict[str, float | str]
    losses: dict[str, float]
    device: str
    quality: Quality
    latency: float | None
    trains: bool


class Baseline(_Part):
    """A baseline file."""

    schema_version: Literal[1] = 1
    command: str
    """The command that wrote the file."""
    environment: Environment
    """The environment of one of its records."""
    runs: dict[str, Entry]
    """By the run's key."""


def entry_of(record: Record) -> Entry:
    """The baseline's entry of a finished record.

    Raises UsageError if the record has no headline metric.
    """
    name = next((name for name in HEADLINES if name in record.metrics), None)
    if name is None or record.cost is None:
        raise UsageError(
            f"record {record.run_id} has none of {', '.join(HEADLINES)}, by which a run is checked"
        )
    metric, cost, config = record.metrics[name], record.cost, record.config
    exact: dict[str, float | str] = {
        "parameters": cost.parameters,
        "MACs": cost.macs_per_sample,
        "NFE": cost.nfe,
    }
    return Entry(
        task=record.task,
        label=full_label(record),
        row=row_key(record),
        config={} if config["init_from"] else config_of(record),
        exact=exact | {f"hash of {part}": value for part, value in record.hashes.items()},
        losses=record.first_losses,
        device=record.environment.device,
        latency=cost.latency.ratio if cost.latency else None,
        trains=bool(config["total_steps"]),
        quality=Quality(
            name=name,
            value=metric.mean,
            lower_is_better=metric.direction == "lower",
            identity=metric.identity_hash,
        ),
    )


def full_label(record: Record) -> str:
    """Task, method, options and number of steps."""
    return f"{record.task}: {label(record)}, {counted(record.config['num_steps'])}"


def config_of(record: Record) -> dict[str, Any]:
    """The config that makes a record again."""
    config, spec = record.config, load_task(record.task).spec
    steps = config["total_steps"]
    named = [
        name
        for name, budget in spec.budgets.items()
        if budget.noise_sets == config["noise_sets"]
        and (not trains(record) or budget.steps == steps)
    ]
    found = {
        "task": record.task,
        "method": record.method,
        "options": record.options,
        "num_steps": config["num_steps"],
        "budget": named[0] if named else f"steps={steps}",
    }
    if not named and config["noise_sets"] != spec.evaluation.noise_sets:
        found["noise_sets"] = config["noise_sets"]
    if steps:
        sizes = {
            name: config[name]
            for name in ("batch_size", "micro_batch_size", "precision", "compile")
            if config[name]
        }
        found |= {"seed": config["seed"], **sizes}
    return found


def checkable(record: Record) -> bool:
    """Whether a record finished on a known task, by a known method, and was trained here."""
    known = record.task in task_names() and record.method in METHODS.names()
    return record.status == "finished" and known and not from_outside(record)


def baseline_of(records: Sequence[Record], command: str) -> Baseline:
    """The baseline of the records that are `checkable`. Raises UsageError if there is none."""
    finished = [record for record in present_last(records) if checkable(record)]
    if not finished:
        raise UsageError("there is no finished record to make a baseline of")
    entries = {key_of_record(record): entry_of(record) for record in finished}
    runs = dict(sorted(entries.items(), key=lambda item: item[1].label))
    return Baseline(command=command, environment=finished[0].environment, runs=runs)


def configs_of(baseline: Baseline) -> list[RunConfig]:
    """The configs that make a baseline's runs again.

    Raises UsageError for a run that starts from another one.
    """
    if alone := [entry.label for entry in baseline.runs.values() if not entry.config]:
        raise UsageError(
            f"{alone[0]} starts from another run, so its config alone cannot make it: "
            "check its record"
        )
    return [parse_config(entry.config) for entry in baseline.runs.values()]


def read_baseline(path: Path) -> Baseline:
    """Reads a baseline file. Raises UsageError if it is missing or broken."""
    try:
        return Baseline.model_validate(read_sealed_json(path, required=False))
    except OSError as error:
        raise UsageError(
            f"cannot read baseline {path}: {error.strerror}; --update makes one"
        ) from error
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"])) or "the whole file"
        raise UsageError(
            f"baseline {path} cannot be read ({place}: {error.errors()[0]['msg']}); "
            "--update makes it anew"
        ) from error
    except ValueError as error:
        raise UsageError(f"baseline {path}: {error}; --update makes it anew") from error


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Writes a baseline aside and renames it."""
    write_sealed_json(path, baseline.model_dump(mode="json"))
