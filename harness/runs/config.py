"""What a person asks for, checked and settled: from a run config to numbers that have one name. Floor 7."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from harness.errors import UsageError, unknown
from harness.files import digest, file_hash
from harness.methods import METHODS, MethodConfig
from harness.metrics.extractors import EXTRACTORS
from harness.records import Record, TrainingBill, read_record
from harness.runs.request import RunConfig
from harness.tasks import Task, load_task
from harness.training.estimate import NOMINAL_STEPS, rehearsal, seconds_a_step, steps_within
from harness.training.trainer import Trainer, TrainSettings

CPU = torch.device("cpu")
UNITS = ("steps", "images", "flops", "seconds")
LARGEST = {"steps": 1e9, "images": 1e12, "flops": 1e24, "seconds": 1e8}
NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?([eE][+]?[0-9]+)?")


@dataclass(frozen=True)
class Parent:
    """The finished run that another one starts from.

    Attributes:
        weights, sha256: its student.
        setting: name of its method and all settings but the seed.
        bill: what it cost, if it was trained.
    """

    run_id: str
    weights: Path
    sha256: str
    setting: str
    bill: TrainingBill | None


@dataclass(frozen=True)
class ExtraFeatures:
    """A feature network that is asked for, and the file of its weights with its SHA-256, if one is given."""

    name: str
    path: Path | None
    sha256: str = ""


@dataclass(frozen=True)
class Resolved:
    """A run whose every number is known; equal ones have one `run_id`."""

    task: Task
    method: str
    config: MethodConfig
    settings: TrainSettings
    num_steps: int
    noise_sets: int
    parent: Parent | None = None
    extra_features: tuple[ExtraFeatures, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """What the run id is the hash of."""
        spec = self.task.spec
        return {
            "task": spec.name, "task_version": spec.version, "spec": self.task.digest, "hashes": self.task.hashes, "method": self.method,
            "options": self.config.model_dump(mode="json"), **self.run_settings,
        }  # fmt: skip

    @property
    def run_settings(self) -> dict[str, Any]:
        """The resolved run config without the method's options."""
        s, parent = self.settings, self.parent
        return {
            "num_steps": self.num_steps, "seed": s.seed, "total_steps": s.total_steps, "batch_size": s.batch_size,
            "micro_batch_size": s.micro_batch_size, "precision": s.precision, "compile": s.compile,
            "noise_sets": self.noise_sets,
            "init_from": {"run_id": parent.run_id, "setting": parent.setting, "sha256": parent.sha256} if parent else None,
            "extra_features": ", ".join(f"{extra.name} {extra.sha256[:8]}".strip() for extra in self.extra_features),
        }  # fmt: skip

    def with_seed(self, seed: int) -> Resolved:
        """The same run with another seed; without training there is none."""
        return replace(self, settings=replace(self.settings, seed=seed)) if METHODS[self.method].sources else self

    @property
    def key(self) -> str:
        """Names the run by its settings alone; unlike the id it stays when options are added to a method."""
        spec, options = self.task.spec, self.config.model_dump(mode="json")
        return digest([spec.name, spec.version, self.method, options, settings_of(self.run_settings), self.settings.seed])

    @property
    def run_id(self) -> str:
        """Method, steps and 10 digits of the identity's hash."""
        return f"{self.method}-{self.num_steps}-{digest(self.identity)[:10]}"


def explain(error: ValidationError, where: str, known: list[str]) -> UsageError:
    """The first complaint of a validation as one sentence."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return unknown("option", name, known, where)
    if first["type"] == "missing":
        return UsageError(f"{where}: {name} is missing")
    return UsageError(f"{where}: {name} is {first['input']!r}, but {first['msg'].replace('Input should', 'it should')}")


def parse_config(values: dict[str, Any]) -> RunConfig:
    """A run config from plain values. Raises UsageError in one sentence."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise explain(error, "run config", list(RunConfig.model_fields)) from error


def parse_options(method: str, values: dict[str, Any], where: str = "") -> MethodConfig:
    """A method's options from plain values. Raises UsageError in one sentence."""
    model = METHODS[method].Config
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explain(error, where or f"options of {method}", list(model.model_fields)) from error


def resolve(config: RunConfig, task: Task | None = None, results: Path = Path("results"), device: torch.device = CPU) -> Resolved:
    """Checks a config and settles every number in it, before anything is computed.

    Args:
        task: what stands for the config's task, which is loaded by its name otherwise.
        results: where a run that is named in `init_from` lies.
        device: where a budget in seconds is measured.

    Raises:
        UsageError: for unknown names and values out of range, in one sentence.
    """
    task, cls = task or load_task(config.task), METHODS[config.method]
    tuned = task.spec.defaults.get(config.method, {})
    parse_options(config.method, tuned, f"task {task.spec.name}, defaults of {config.method}")
    options = parse_options(config.method, {**tuned, **config.options})
    batch_size = config.batch_size or task.spec.batch_size
    if cls.needs_labels and task.conditions.table is not None:
        raise UsageError(f"{config.method} needs class labels, but task {task.spec.name} is conditioned on text")
    cls.check(options, task, config.num_steps)
    method, options = cls.canonical(options, config.num_steps)
    micro = None if config.micro_batch_size == batch_size else config.micro_batch_size
    if batch_size % (config.micro_batch_size or batch_size):
        raise UsageError(f"micro_batch_size is {config.micro_batch_size}, but must divide batch_size, which is {batch_size}")
    for name, size in (("batch_size", batch_size), ("micro_batch_size", config.micro_batch_size or batch_size)):
        if size % options.sample_group:
            raise UsageError(f"{name} is {size}, but {config.method} treats {options.sample_group} samples together: give a multiple")
    if options.whole_batch and micro is not None:
        raise UsageError(f"micro_batch_size is {micro}, but these options of {config.method} need the whole batch at once: leave it out")
    if options.looks_inside and config.compile:
        raise UsageError(f"compile is given, but these options of {config.method} look inside the network that is trained: leave it out")
    if config.compile and config.budget.startswith("seconds="):
        raise UsageError(
            f"budget is {config.budget!r}, but seconds are measured without compile: give another budget, or leave compile out"
        )
    if not cls.sources and config.init_from is not None:
        raise UsageError(f"init_from is given, but {config.method} trains nothing: leave it out")

    def training(total_steps: int) -> TrainSettings:
        return TrainSettings(
            total_steps,
            batch_size,
            config.seed,
            micro,
            config.precision,
            config.compile,
            sample_group=options.sample_group,
            counted_samples=options.counted_samples,
        )

    def rehearse(total_steps: int) -> Trainer:  # the seed's share in the FLOPs of a step, if any, must not change the budget
        return rehearsal(method, options, task, config.num_steps, replace(training(total_steps), seed=0), device)

    total_steps, noise_sets = resolve_budget(config.budget, task, batch_size, rehearse if cls.sources else None)
    if config.noise_sets is not None:
        if config.noise_sets > task.spec.evaluation.noise_sets:
            raise UsageError(f"noise_sets is {config.noise_sets}, but task {task.spec.name} has {task.spec.evaluation.noise_sets}")
        noise_sets = config.noise_sets
    if not cls.sources:  # nothing of the training's settings matters
        return Resolved(task, method, options, TrainSettings(0, 0, 0), config.num_steps, noise_sets, None, extra_features(config))
    parent = find_parent(config.init_from, results, task, METHODS[method].output(options, task)) if config.init_from is not None else None
    return Resolved(task, method, options, training(total_steps), config.num_steps, noise_sets, parent, extra_features(config))


def extra_features(config: RunConfig) -> tuple[ExtraFeatures, ...]:
    """The feature networks that a config names. Raises UsageError for an unknown name or a file that is not there."""
    found = []
    for said in config.extra_features:
        name, equals, file = said.partition("=")
        if name not in EXTRACTORS:
            raise unknown("feature network", name, EXTRACTORS, "extra_features")
        if equals and not Path(file).is_file():
            raise UsageError(f"extra_features: there is no file of weights {file!r}; give {name}=FILE, or {name} alone to download it")
        found.append(ExtraFeatures(name, Path(file), file_hash(Path(file))) if equals else ExtraFeatures(name, None))
    return tuple(found)


def find_parent(run_id: str, results: Path, task: Task, output: str) -> Parent:
    """A finished run to start from. Raises UsageError if there is none, if it belongs to another task, or if the output of its student
    is taken for something else than `output`.
    """
    folder = results / "runs" / run_id
    if not (folder / "record.json").is_file() or not (folder / "student.safetensors").is_file():
        raise UsageError(f"init_from is {run_id!r}, but {folder} holds no finished run with a student")
    record = read_record(folder / "record.json")
    if record.status != "finished" or record.cost is None or record.task != task.spec.name:
        raise UsageError(
            f"init_from is {run_id!r}, which is a {record.status} run of {record.task}: give a finished one of {task.spec.name}"
        )
    theirs = METHODS[record.method].output(parse_options(record.method, record.options, f"init_from {run_id}"), task)
    if theirs != output:
        raise UsageError(f"init_from is {run_id!r}, whose network gives {theirs}, but this one gives {output}: start from the same kind")
    setting = digest([record.method, all_options(record), settings(record)])[:8]
    return Parent(
        run_id=run_id,
        weights=folder / "student.safetensors",
        sha256=file_hash(folder / "student.safetensors"),
        setting=f"{record.method}-{record.config['num_steps']}-{setting}",
        bill=record.cost.training,
    )


def resolve_budget(budget: str, task: Task, batch_size: int, rehearse: Callable[[int], Trainer] | None) -> tuple[int, int]:
    """Training steps and evaluation noise sets of a budget.

    Args:
        rehearse: from a number of steps to a trainer on which FLOPs are counted or seconds measured; None where nothing is trained.

    Raises UsageError if it is neither a name nor a number of something, or is too small for one step.
    """
    if budget in task.spec.budgets:
        named = task.spec.budgets[budget]
        return named.steps, named.noise_sets
    unit, _, said = budget.partition("=")
    number = float(said) if NUMBER.fullmatch(said) else math.nan
    if unit in ("steps", "images") and not number.is_integer():
        number = math.nan
    if unit not in UNITS or not 0 <= number <= LARGEST[unit]:
        forms = [*task.spec.budgets, *(f"{unit}=NUMBER" for unit in UNITS)]
        raise UsageError(f"budget is {budget!r}, but must be one of: {', '.join(forms)}")
    if rehearse is None:
        return 0, task.spec.evaluation.noise_sets
    steps = {
        "steps": lambda: int(number),
        "images": lambda: int(number) // batch_size,
        "flops": lambda: steps_within(number, rehearse),
        "seconds": lambda: int(number / seconds_a_step(rehearse(NOMINAL_STEPS))),
    }[unit]()
    if steps == 0 and budget != "steps=0":
        raise UsageError(f"budget is {budget!r}, which is less than one training step of {batch_size} images")
    return steps, task.spec.evaluation.noise_sets


def reference_of(task: Task) -> Resolved:
    """The run beside which every row of a task is shown."""
    wanted = task.spec.reference
    config = RunConfig(task=task.spec.name, method=wanted.method, num_steps=wanted.num_steps, options=wanted.options)
    return resolve(config, task)


PLAIN_CONFIG = {"precision": "fp32", "compile": False, "micro_batch_size": None, "init_from": None}
"""Settings that are named only where they differ; a record from before one existed has it like this."""
LATER = ("compile",)
"""Those that baselines are older than: a key holds them only where they differ."""


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """What of a run config makes a row: not the seed, not which further metrics were measured; a run that was started from is
    known by its setting.
    """
    whole = {**PLAIN_CONFIG, **{name: value for name, value in config.items() if name not in ("seed", "extra_features")}}
    whole |= {"init_from": whole["init_from"] and whole["init_from"]["setting"]}
    return {name: value for name, value in whole.items() if name not in LATER or value != PLAIN_CONFIG[name]}


def settings(record: Record) -> dict[str, Any]:
    """The `settings_of` a record."""
    return settings_of(record.config)


def all_options(record: Record) -> dict[str, Any]:
    """The options by which a record's row is known: those that did not exist when it was made, or do nothing, at their defaults."""
    if record.method not in METHODS.names():
        return record.options
    cls = METHODS[record.method]
    try:
        return cls.canonical(cls.Config(**record.options), record.config["num_steps"])[1].model_dump(mode="json")
    except ValidationError:  # an option or value of another version
        return record.options


def key_of_record(record: Record) -> str:
    """What a record's run is known by, whatever version of the code named it; see `Resolved.key`."""
    return digest([record.task, record.task_version, record.method, all_options(record), settings(record), record.config["seed"]])
