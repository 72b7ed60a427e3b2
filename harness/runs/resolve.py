"""From a run config to numbers: everything is checked and settled before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from harness import ranks
from harness.data.recipe import Recipe
from harness.errors import UsageError, unknown
from harness.files import check_name, file_hash, inside
from harness.methods import METHODS, Method, MethodConfig
from harness.metrics.extra import EXTRACTORS
from harness.records import TrainingBill, read_record
from harness.runs import identity
from harness.runs.budgets import evaluated_noise_sets, parse_budget, training_steps
from harness.runs.config import FIRST_TUNING_SEED, RunConfig, parse_options
from harness.tasks import Task, load_task
from harness.training.estimate import rehearsal, store_bill
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

CPU = torch.device("cpu")
UNTRAINED = TrainSettings(total_steps=0, batch_size=0, seed=0)
"""The settings of a method that trains nothing."""


@dataclass(frozen=True)
class Parent:
    """The finished run that another one starts from.

    Attributes:
        weights, sha256: the file of the student's weights and its SHA-256.
        setting: a name of its method and settings without the seed.
        bill: the cost of its training, if it was trained.
        optimizer: the file of its optimizer's state, if the run has one.
        recipe: the recipe of its trajectories, if it was made here.
    """

    run_id: str
    weights: Path
    sha256: str
    setting: str
    bill: TrainingBill | None
    optimizer: Path | None = None
    recipe: Recipe | None = None


@dataclass(frozen=True)
class ExtraFeatures:
    """A further feature network, and the file of its weights with its SHA-256 if one is given."""

    name: str
    path: Path | None
    sha256: str = ""


@dataclass(frozen=True)
class Resolved:
    """A run whose every number is known; equal ones have one `run_id` (see `runs/identity.py`)."""

    task: Task
    method: str
    config: MethodConfig
    settings: TrainSettings
    num_steps: int
    noise_sets: int
    parent: Parent | None = None
    extra_features: tuple[ExtraFeatures, ...] = ()

    @property
    def run_id(self) -> str:
        return identity.run_id(self)

    @property
    def key(self) -> str:
        return identity.run_key(self)

    @property
    def cls(self) -> type[Method]:
        """The method's class."""
        return METHODS[self.method]

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run's trajectories: the task's, with the run's seed."""
        grid = self.cls.trajectory_grid(self.config)
        return self.task.recipe.of_run(self.settings.seed, grid)

    @property
    def shares_student(self) -> bool:
        """Whether one training run serves several numbers of sampling steps."""
        return self.cls.trained_once(self.config) and bool(self.settings.total_steps)

    def with_seed(self, seed: int) -> Resolved:
        """The same run with another seed; a method that trains nothing has none."""
        return (
            replace(self, settings=replace(self.settings, seed=seed)) if self.cls.sources else self
        )


def resolve(
    config: RunConfig,
    task: Task | None = None,
    results: Path = Path("results"),
    device: torch.device = CPU,
) -> Resolved:
    """Checks a config and settles every number in it.

    Args:
        task: replaces the config's task; without it that task is loaded by name.
        results: the results folder with the run that `init_from` names.
        device: the device on which a budget in seconds is measured.

    Raises:
        UsageError: for unknown names and for values that do not fit, in one sentence.
    """
    task = (task or load_task(config.task)).judged_for(config.purpose)
    num_steps = config.num_steps
    cls, options = METHODS[config.method], options_on(task, config)
    cls.check(options, task, num_steps)
    method, options = cls.canonical(options, num_steps)
    features = extra_features(config)
    noise_sets = evaluated_noise_sets(config.budget, config.noise_sets, task)
    if not cls.sources:
        _check_training_free(config, task)
        return Resolved(task, method, options, UNTRAINED, num_steps, noise_sets, None, features)
    _check_seed(config)
    settings = train_settings(config, options, task)

    def rehearse(total_steps: int) -> Trainer:
        """A trainer of seed 0: a seed's share in a step's FLOPs must not change the budget."""
        trained = replace(settings, total_steps=total_steps, seed=0)
        return rehearsal(method, options, task, num_steps, trained, device)

    def stored() -> float:
        cls = METHODS[method]
        if "trajectory" not in cls.sources:
            return 0.0
        recipe = task.recipe.of_run(0, cls.trajectory_grid(options))
        return store_bill(task.teacher(device), recipe, task)[1]

    total_steps = training_steps(config.budget, task, settings.batch_size, rehearse, stored)
    parent = None
    if config.init_from:
        output = METHODS[method].output(options, task)
        parent = find_parent(config.init_from, results, task, output)
    settings = replace(settings, total_steps=total_steps)
    return Resolved(task, method, options, settings, num_steps, noise_sets, parent, features)


def options_on(task: Task, config: RunConfig) -> MethodConfig:
    """The method's options: the config's over the task's over the method's own.

    Raises UsageError for options that do not fit, and for a method that the task cannot have.
    """
    tuned = task.spec.defaults.get(config.method, {})
    parse_options(config.method, tuned, f"task {task.spec.name}, defaults of {config.method}")
    METHODS[config.method].check_conditions(task.spec.name, task.spec.prompts is not None)
    options = parse_options(config.method, {**tuned, **config.options})
    if options.needs_network_teacher and not task.network_teacher:
        raise UsageError(
            f"lora_rank needs a teacher that is a network, but that of task {task.spec.name} "
            "is a closed formula: leave it out"
        )
    return options


def _check_seed(config: RunConfig) -> None:
    """Raises UsageError for a seed of the other purpose: no table may use a seed that chose."""
    if (config.seed >= FIRST_TUNING_SEED) != (config.purpose == "tune"):
        seeds = "from" if config.purpose == "tune" else "below"
        raise UsageError(
            f"seed is {config.seed}, but purpose {config.purpose} needs seeds "
            f"{seeds} {FIRST_TUNING_SEED}: searches and tables share no seed"
        )


def train_settings(config: RunConfig, options: MethodConfig, task: Task) -> TrainSettings:
    """The settings of a run's training, with the number of steps still open.

    Raises UsageError for settings that contradict each other.
    """
    size = config.batch_size or task.spec.batch_size
    micro = None if config.micro_batch_size == size else config.micro_batch_size
    if size % (micro or size):
        raise UsageError(
            f"micro_batch_size is {micro}, but must divide batch_size, which is {size}"
        )
    for name, number in (("batch_size", size), ("micro_batch_size", micro or size)):
        if number % options.sample_group:
            raise UsageError(
                f"{name} is {number}, "
                f"but {config.method} treats {options.sample_group} samples together: "
                "give a multiple"
            )
    if options.whole_batch and ranks.count() > 1:
        raise UsageError(
            f"these options of {config.method} need the whole batch at once: run it on one rank"
        )
    if options.whole_batch and micro is not None:
        raise UsageError(
            f"micro_batch_size is {micro}, "
            f"but these options of {config.method} need the whole batch at once: leave it out"
        )
    if config.compile:
        _check_compile(config, options)
    return TrainSettings(
        total_steps=0,
        batch_size=size,
        seed=config.seed,
        micro_batch_size=micro,
        precision=config.precision,
        compile=config.compile,
        sample_group=options.sample_group,
        counted_samples=options.counted_samples,
    )


def _check_compile(config: RunConfig, options: MethodConfig) -> None:
    """Raises UsageError for settings that compiled training cannot have."""
    if options.reads_activations:
        raise UsageError(
            f"compile is given, but these options of {config.method} "
            "look inside the network that is trained: leave it out"
        )
    if config.budget.startswith("seconds="):
        raise UsageError(
            f"budget is {config.budget!r}, but seconds are measured without compile: "
            "give another budget, or leave compile out"
        )


def _check_training_free(config: RunConfig, task: Task) -> None:
    """Raises UsageError for settings that a method without training cannot have."""
    if config.init_from is not None:
        raise UsageError(f"init_from is given, but {config.method} trains nothing: leave it out")
    if config.budget not in task.spec.budgets:
        parse_budget(config.budget, task)


def extra_features(config: RunConfig) -> tuple[ExtraFeatures, ...]:
    """The extra feature networks of a config.

    Raises UsageError for an unknown name, a missing file, or two networks of one metric.
    """
    found: list[ExtraFeatures] = []
    for wanted in config.extra_features:
        name, equals, file = wanted.partition("=")
        if name not in EXTRACTORS:
            raise unknown("feature network", name, EXTRACTORS, "extra_features")
        if equals and not Path(file).is_file():
            raise UsageError(
                f"extra_features: there is no file of weights {file!r}; "
                f"give {name}=FILE, or {name} alone to download it"
            )
        if any(EXTRACTORS[name].metric == EXTRACTORS[other.name].metric for other in found):
            raise UsageError(
                f"extra_features names two networks of {EXTRACTORS[name].metric}: leave one out"
            )
        found.append(
            ExtraFeatures(name, Path(file), file_hash(Path(file)))
            if equals
            else ExtraFeatures(name, None)
        )
    return tuple(found)


def find_parent(run_id: str, results: Path, task: Task, output: str) -> Parent:
    """The finished run to start from.

    Args:
        output: the kind of prediction of the new student's network.

    Raises UsageError if there is no such run, if it belongs to another task, or if its network
    predicts something else than `output`.
    """
    folder = inside(results / "runs" / check_name(run_id, "init_from"), results)
    if not (folder / "record.json").is_file() or not (folder / "student.safetensors").is_file():
        raise UsageError(
            f"init_from is {run_id!r}, but {folder} holds no finished run with a student"
        )
    record = read_record(folder / "record.json")
    if record.status != "finished" or record.cost is None or record.task != task.spec.name:
        raise UsageError(
            f"init_from is {run_id!r}, which is a {record.status} run of {record.task}: "
            f"give a finished one of {task.spec.name}"
        )
    if (purpose := record.config.get("purpose", "evaluate")) != task.purpose:
        raise UsageError(
            f"init_from is {run_id!r}, a run of purpose {purpose}, but this one has purpose "
            f"{task.purpose}: searches and tables share no student"
        )
    cls = METHODS[record.method]
    options = parse_options(record.method, record.options, f"init_from {run_id}")
    theirs = cls.output(options, task)
    if theirs != output:
        raise UsageError(
            f"init_from is {run_id!r}, whose network gives {theirs}, "
            f"but this one gives {output}: start from the same kind"
        )
    weights = inside(folder / "student.safetensors", results)
    trained_in = record.trained_in or run_id
    kept = folder.parent / trained_in / "optimizer.safetensors"
    identity.refuse_other_run(weights, run_id)
    if kept.is_file():
        identity.refuse_other_run(kept, trained_in)
    return Parent(
        run_id,
        weights,
        file_hash(weights),
        identity.setting_name(record),
        record.cost.training,
        kept if kept.is_file() else None,
        task.recipe.of_run(record.config["seed"], cls.trajectory_grid(options)),
    )


def reference_of(task: Task) -> Resolved:
    """The run beside which every row of a task is shown, judged by the task's noise."""
    wanted = task.spec.reference
    config = RunConfig(
        task=task.spec.name,
        method=wanted.method,
        num_steps=wanted.num_steps,
        options=wanted.options,
        purpose=task.purpose,
    )
    return resolve(config, task)
