"""Names of runs in tables: the method and the options that matter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic.fields import FieldInfo

from harness.errors import UsageError
from harness.methods import METHODS
from harness.records import Record
from harness.runs.identity import PLAIN_SETTINGS, all_options, settings_of
from harness.tasks import load_task, task_names


def counted(number: int, noun: str = "step") -> str:
    """Such as "1 step" or "4 steps"."""
    return f"{number} {noun}{'s' if number != 1 else ''}"


def label(record: Record, options: Mapping[str, Any] | None = None) -> str:
    """The method, its options that every label names, and those off the task's defaults.

    Args:
        options: the record's `all_options`, if the caller has them already.
    """
    options, settings = (
        all_options(record) if options is None else options,
        settings_of(record.config),
    )
    shown = off_task(record, options)
    if record.method in METHODS.names():
        config = METHODS[record.method].Config
        fields = config.model_fields
        shown = {
            name: value
            for name, value in options.items()
            if name in fields and in_label(fields[name])
        } | shown
        shown = _named(shown, options, config.named)
    shown |= {
        name: settings[name] for name, plain in PLAIN_SETTINGS.items() if settings[name] != plain
    }
    return ", ".join([record.method, *([options_text(shown)] if shown else [])])


def _named(
    shown: Mapping[str, Any],
    options: Mapping[str, Any],
    named: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> dict[str, Any]:
    """The shown options with a name in the place of those that it stands for."""
    found = dict(shown)
    for option, names in named.items():
        for name, meant in names.items():
            if meant.items() <= options.items() and found.keys() & meant:
                found = {key: value for key, value in found.items() if key not in meant}
                found[option] = name
    return found


def options_text(options: Mapping[str, Any]) -> str:
    """Such as "history_layers 1, lr 0.00054"."""
    return ", ".join(f"{name} {_short(value)}" for name, value in options.items())


def in_label(option: FieldInfo) -> bool:
    """Whether every label names an option."""
    return isinstance(option.json_schema_extra, dict) and bool(
        option.json_schema_extra.get("in_label")
    )


def off_task(record: Record, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that differ from what a run of the method has on the record's task.

    These are all options for an unknown method.
    """
    if record.method not in METHODS.names():
        return dict(options)
    config, tuned = METHODS[record.method].Config, defaults_of(record.task).get(record.method, {})
    num_steps = record.config["num_steps"]

    def differing(given: Mapping[str, Any]) -> dict[str, Any]:
        """The options that differ where these are given."""
        plain = _defaults(record.method, json.dumps({**tuned, **given}), num_steps)
        return {n: value for n, value in options.items() if n not in plain or value != plain[n]}

    shown = differing({})
    stated = {name: value for name, value in shown.items() if name in config.model_fields}
    try:  # one option may set another's default
        for name in stated:
            if name not in differing({n: v for n, v in stated.items() if n != name}):
                del shown[name]
        shown |= differing({name: value for name, value in stated.items() if name in shown})
    except (ValueError, UsageError):  # of an older version, which took other values
        return differing({})
    return {name: value for name, value in options.items() if name in shown}


@cache
def _defaults(method: str, given: str, num_steps: int) -> dict[str, Any]:
    """All options of a method of which some are given, in canonical form, as records have them."""
    config = METHODS[method].Config(**json.loads(given))
    name, canonical = METHODS[method].canonical(config, num_steps)
    return (canonical if name == method else config).model_dump(mode="json")


@cache
def defaults_of(task: str) -> Mapping[str, Mapping[str, Any]]:
    """A task's own defaults of options, by method; empty for an unknown task."""
    return load_task(task).spec.defaults if task in task_names() else {}


def guidance_of(task: str) -> float:
    """The guidance scale of a task's teacher; 1, which is none, for an unknown task."""
    return load_task(task).spec.guidance.scale if task in task_names() else 1.0


def _short(value: Any) -> str:
    """A list with commas, a long number with four digits."""
    if isinstance(value, float) and len(str(value)) > len("0.00054"):
        return f"{value:.4g}"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
