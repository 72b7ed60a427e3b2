"""Every name, key and hash of a run, in one file.

`run_id` names a run's folder: a hash of everything that determines the run except the code.
`run_key` names the run by its settings alone, so it does not change when a method gains options.
`row_key` is the same without the seed: the runs of one row of a table.
The others name what runs share (a student, cached samples) or what a checkpoint belongs to.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from harness.errors import UsageError
from harness.files import digest, header_of
from harness.methods import METHODS
from harness.provenance import code_digest
from harness.records import Record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.runs.config import RunConfig
    from harness.runs.resolve import Resolved
    from harness.tasks import Task

EVALUATION = ("noise_sets", "extra_features", "purpose")
"""Fields of a run's identity that decide how the student is evaluated, not how it is made."""
PLAIN_SETTINGS = {
    "precision": "fp32",
    "compile": False,
    "micro_batch_size": None,
    "init_from": None,
}
"""Settings that a table names only where they differ."""


def run_settings(resolved: Resolved) -> dict[str, Any]:
    """The resolved run config without the method's options, as a record keeps it."""
    s, parent = resolved.settings, resolved.parent
    features = (f"{extra.name} {extra.sha256[:8]}".strip() for extra in resolved.extra_features)
    return {
        "num_steps": resolved.num_steps,
        "seed": s.seed,
        "total_steps": s.total_steps,
        "batch_size": s.batch_size,
        "micro_batch_size": s.micro_batch_size,
        "precision": s.precision,
        "compile": s.compile,
        "noise_sets": resolved.noise_sets,
        "init_from": parent
        and {"run_id": parent.run_id, "setting": parent.setting, "sha256": parent.sha256},
        "extra_features": ", ".join(features),
        **other_purpose(resolved.task),
    }


def other_purpose(task: Task) -> dict[str, str]:
    """The purpose of a task's evaluation noise, as runs name it where it is not "evaluate"."""
    return {} if task.purpose == "evaluate" else {"purpose": task.purpose}


def run_hashes(resolved: Resolved) -> dict[str, str]:
    """SHA-256 of everything on which a run's numbers rest.

    Where the reference is apart, those of the task do not name the training images.
    """
    task = resolved.task
    reads = resolved.cls.reads_data(resolved.config, resolved.settings.total_steps)
    named = task.spec.evaluation.reference_npz is None and task.split.apart is None
    return task.hashes if named or not reads else {**task.hashes, "data": task.data_hash}


def run_identity(resolved: Resolved) -> dict[str, Any]:
    """Everything that determines a run except the code; the run's id is the hash of it."""
    spec = resolved.task.spec
    return {
        "task": spec.name,
        "task_version": spec.version,
        "spec": resolved.task.digest,
        "hashes": run_hashes(resolved),
        "method": resolved.method,
        "options": resolved.config.model_dump(mode="json"),
        **run_settings(resolved),
    }


def run_id(resolved: Resolved) -> str:
    """The name of a run's folder: method, sampling steps and 10 digits of its identity's hash."""
    return f"{resolved.method}-{resolved.num_steps}-{digest(run_identity(resolved))[:10]}"


def student_key(resolved: Resolved) -> str:
    """The name of a run's student, which does not depend on how the student is evaluated."""
    whole = run_identity(resolved)
    student = {
        name: value for name, value in whole.items() if name not in ("num_steps", *EVALUATION)
    }
    return f"student-{resolved.method}-{digest(student)[:10]}"


def samples_key(resolved: Resolved, noise_set: int, device: torch.device) -> dict[str, Any]:
    """What determines the samples of a training-free run, the code that makes them included."""
    whole = {
        name: value for name, value in run_identity(resolved).items() if name not in EVALUATION
    }
    return {
        **whole,
        **other_purpose(resolved.task),
        "set": noise_set,
        "device": device.type,
        "code": code_digest(),
    }


def checkpoint_key(resolved: Resolved, code: str) -> str:
    """What a checkpoint belongs to: the run and the code that made it."""
    return digest([run_identity(resolved), code])


def run_key(resolved: Resolved) -> str:
    """A run by its settings alone, as `key_of_record` gives it for the run's record."""
    spec, settings = resolved.task.spec, settings_of(run_settings(resolved))
    options = resolved.config.model_dump(mode="json")
    return digest(
        [spec.name, spec.version, resolved.method, options, settings, resolved.settings.seed]
    )


def key_of_record(record: Record) -> str:
    """A record's run by its settings alone, whatever version of the code made it."""
    seed, settings = record.config["seed"], settings_of(record.config)
    return digest(
        [record.task, record.task_version, record.method, all_options(record), settings, seed]
    )


def row_key(record: Record, options: dict[str, Any] | None = None) -> str:
    """The key of a record's row in a table: task, method and settings without the seed.

    Args:
        options: what `all_options` gives for the record, if it is known.
    """
    options = all_options(record) if options is None else options
    return digest([record.task, record.method, options, settings_of(record.config)])


def setting_name(record: Record) -> str:
    """A short name of a record's method and settings without the seed.

    Runs that start from the record's student carry this name.
    """
    setting = digest([record.method, all_options(record), settings_of(record.config)])[:8]
    return f"{record.method}-{record.config['num_steps']}-{setting}"


def outside_run_id(task: Task, name: str, hashes: dict[str, str], config: dict[str, Any]) -> str:
    """The name of a record of work from elsewhere.

    Args:
        hashes: SHA-256 of what its numbers rest on, the work itself included.
    """
    key = digest([task.digest, name, hashes, config])[:10]
    return f"{name}-{config['num_steps']}-{key}"


def shipped_network_key(task: Task, name: str, training: dict[str, Any]) -> str:
    """What a checkpoint of a shipped network's training belongs to."""
    parts = {"data", "network", "schedule", "prediction_type"}
    return digest([name, task.spec.model_dump(mode="json", include=parts), training, code_digest()])


def study_name(configs: Sequence[RunConfig], search: dict[str, Any]) -> str:
    """The name of a search's study: a hash of all that its trials have in common."""
    first, seeds = configs[0], [config.seed for config in configs]
    key = digest([first.model_dump_json(exclude={"seed"}), seeds, search])[:10]
    return f"{first.method}-{first.num_steps}-{key}"


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a record's config that makes a row: neither the seed nor further metrics.

    A run that this one starts from counts by its setting, so that seeds of a chain make one row.
    """
    whole = {
        name: value for name, value in config.items() if name not in ("seed", "extra_features")
    }
    return {**whole, "init_from": whole["init_from"] and whole["init_from"]["setting"]}


def refuse_other_run(path: Path, run_id: str) -> None:
    """Raises UsageError if a file of weights says that it belongs to another run."""
    if (found := header_of(path)[0].get("run_id", run_id)) != run_id:
        raise UsageError(f"{path} is of run {found}: delete it and make run {run_id} again")


def all_options(record: Record) -> dict[str, Any]:
    """A record's options in canonical form.

    Options that did not exist when the record was made have their defaults.
    """
    if record.method not in METHODS.names():
        return record.options
    cls = METHODS[record.method]
    try:
        canonical = cls.canonical(cls.Config(**record.options), record.config["num_steps"])
    except ValidationError:  # an option or a value of another version
        return record.options
    return canonical[1].model_dump(mode="json")
