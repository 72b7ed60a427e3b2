"""One run: from a config to a record. Floor 7: ties tasks, methods, trainer and evaluator together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from harness.conditions import Condition
from harness.data.trajectories import TRAJECTORY_ROOMS, Progress, TrajectoryStore, cached_samples, open_store
from harness.denoiser import Guided, count_passes
from harness.errors import RunFailed, UsageError, unknown
from harness.evaluator import Evaluator, sample_grid, sample_set, sampling_cost
from harness.files import digest, write_aside, write_tensors
from harness.methods import METHODS, Method, MethodConfig
from harness.metrics.compute import count_flops, parameters
from harness.metrics.exposure import exposure_bias
from harness.metrics.latency import interleaved_latency
from harness.randomness import keyed_initialisation
from harness.records import (
    Cost,
    Environment,
    Exposure,
    LatencyEntry,
    Record,
    TrainingBill,
    capture_environment,
    code_digest,
    read_record,
    write_record,
)
from harness.schedules import few_step_levels
from harness.solvers import SOLVERS, Trajectory, integrate
from harness.tasks import Task, load_task
from harness.trainer import Bill, Trainer, TrainSettings

Report = Callable[[str], Progress]
"""From the name of a stage to a callback that is told how far it is."""

EMA_WEIGHT_FLAG = 0.01
SAMPLING_ROOMS = (*TRAJECTORY_ROOMS, "methods", "tasks", "evaluator.py")
"""What decides the samples of a training-free run: cached ones are not used after a change there."""


class RunConfig(BaseModel):
    """What a person asks for."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    method: str
    """Name of the method."""
    task: str = "digits"
    """Name of the task."""
    options: dict[str, Any] = {}
    """Options of the method that differ from its defaults."""
    num_steps: int = Field(4, ge=1, le=1000)
    """Steps that the student takes."""
    seed: int = Field(0, ge=0, le=2**31)
    """Seed of initialisation, batches and training noise."""
    budget: str = "quick"
    """A budget of the task, or steps=NUMBER, or images=NUMBER."""
    batch_size: int | None = Field(None, ge=1, le=2**20)
    """Samples a training step (the task's by default)."""
    micro_batch_size: int | None = Field(None, ge=1, le=2**20)
    """Samples a forward pass; must divide the batch size."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the losses' forward passes."""


@dataclass(frozen=True)
class Resolved:
    """A run whose every number is known; equal ones have one `run_id`."""

    task: Task
    method: str
    config: MethodConfig
    settings: TrainSettings
    num_steps: int
    noise_sets: int

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
        s = self.settings
        return {
            "num_steps": self.num_steps, "seed": s.seed, "total_steps": s.total_steps, "batch_size": s.batch_size,
            "micro_batch_size": s.micro_batch_size, "precision": s.precision, "noise_sets": self.noise_sets,
        }  # fmt: skip

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


def parse_options(method: str, values: dict[str, Any]) -> MethodConfig:
    """A method's options from plain values. Raises UsageError in one sentence."""
    model = METHODS[method].Config
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explain(error, f"options of {method}", list(model.model_fields)) from error


def resolve(config: RunConfig, task: Task | None = None) -> Resolved:
    """Checks a config and settles every number in it, before anything is computed.

    Args:
        task: what stands for the config's task, which is loaded by its name otherwise.

    Raises:
        UsageError: for unknown names and values out of range, in one sentence.
    """
    task, cls = task or load_task(config.task), METHODS[config.method]
    options = parse_options(config.method, config.options)
    batch_size = config.batch_size or task.spec.batch_size
    total_steps, noise_sets = resolve_budget(config.budget, task, batch_size)
    cls.check(options, task, config.num_steps)
    method, options = cls.canonical(options, config.num_steps)
    micro = None if config.micro_batch_size == batch_size else config.micro_batch_size
    settings = TrainSettings(total_steps, batch_size, config.seed, micro, config.precision)
    if batch_size % (config.micro_batch_size or batch_size):
        raise UsageError(f"micro_batch_size is {config.micro_batch_size}, but must divide batch_size, which is {batch_size}")
    if not cls.sources:  # training-free: nothing of the training's settings matters
        settings = TrainSettings(total_steps=0, batch_size=0, seed=0)
    return Resolved(task, method, options, settings, config.num_steps, noise_sets)


def resolve_budget(budget: str, task: Task, batch_size: int) -> tuple[int, int]:
    """Training steps and evaluation noise sets of a budget. Raises UsageError if it is neither a name nor a number of something."""
    if budget in task.spec.budgets:
        named = task.spec.budgets[budget]
        return named.steps, named.noise_sets
    unit, _, number = budget.partition("=")
    per_step = {"steps": 1, "images": batch_size}
    if unit not in per_step or not number.isascii() or not number.isdigit() or len(number) > 12 or int(number) < per_step[unit]:
        forms = [*task.spec.budgets, "steps=NUMBER", f"images=NUMBER (at least {batch_size})"]
        raise UsageError(f"budget is {budget!r}, but must be one of: {', '.join(forms)}")
    return int(number) // per_step[unit], task.spec.evaluation.noise_sets


def silent(stage: str) -> Progress:
    """A report of progress that nobody reads."""
    return lambda done, total: None


@dataclass
class Run:
    """A resolved run and the folder `results/runs/<run_id>/` it lives in."""

    resolved: Resolved
    results: Path
    device: torch.device
    report: Report = silent
    environment: Environment = field(init=False)

    @property
    def folder(self) -> Path:
        return self.results / "runs" / self.resolved.run_id

    def finished_record(self, any_code: bool = False) -> Record | None:
        """The record of this run if it finished on this kind of device, made by the same code (or by any)."""
        path = self.folder / "record.json"
        if not path.exists():
            return None
        record = read_record(path)
        here = capture_environment(self.device)
        same = record.environment.device == here.device and (any_code or record.environment.code == here.code)
        return record if record.status == "finished" and same else None

    def execute(self, reuse: bool = False) -> Record:
        """The record of this run: the finished one, or trained (resuming an interrupted run) and evaluated now.

        A run that fails writes a record with its reason, then raises RunFailed.
        """
        if (record := self.finished_record(reuse)) is not None:
            return record
        self.environment = capture_environment(self.device)  # now: sources may be edited while it runs
        try:
            record = self._train_and_evaluate()
        except (RunFailed, ValueError, torch.OutOfMemoryError) as error:
            write_record(self.folder / "record.json", self._record(status="failed", reason=str(error)))
            raise RunFailed(f"run {self.resolved.run_id} failed: {error}") from error
        write_record(self.folder / "record.json", record)
        shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)
        return record

    def samples(self, sampler: Callable[[Tensor, Condition], Tensor], noise_set: int) -> Tensor:
        """Samples of a noise set, [N, C, H, W]; a training-free run's are kept in the cache."""

        def compute() -> Tensor:
            progress = self.report(f"sampling, noise set {noise_set}")
            return sample_set(sampler, self.resolved.task, noise_set, self.device, progress)

        if self.resolved.settings.total_steps:
            return compute()
        identity = {k: v for k, v in self.resolved.identity.items() if k != "noise_sets"}
        return cached_samples({**identity, "set": noise_set, "code": code_digest(SAMPLING_ROOMS)}, compute)

    def _train_and_evaluate(self) -> Record:
        r, task = self.resolved, self.resolved.task
        teacher = task.teacher(self.device)
        method = self.build(teacher)
        bill = self._train(method, teacher) if method.players else None
        sampler = self.sampler(method)
        reference = Run(reference_of(task), self.results, self.device, self.report)
        reference_sampler = reference.sampler(reference.build(teacher))
        samples = {k: self.samples(sampler, k) for k in range(r.noise_sets)}
        evaluator = Evaluator(task, lambda k: reference.samples(reference_sampler, k), self.device)
        metrics = evaluator.evaluate(samples)
        nfe, macs = sampling_cost(sampler, method.passes_through, task, self.device)
        latency = self._latency(sampler, reference_sampler)
        self._keep(method, samples[0], reference.samples(reference_sampler, 0))
        exposure = self._exposure(method, teacher)
        flags = []
        if bill and bill.ema_initial_weight > EMA_WEIGHT_FLAG:
            flags.append(f"the evaluated average still holds {bill.ema_initial_weight:.1%} of the initial weights")
        cost = Cost(parameters=parameters(method.passes_through), nfe=nfe, macs_per_sample=macs,
                    latency=latency, training=bill)  # fmt: skip
        levels = [round(float(method_time), 4) for method_time in task.schedule.network_time(method.levels[:-1])]
        return self._record(
            status="finished", levels=levels, metrics=metrics, exposure=exposure, cost=cost, flags=flags, target=method.target
        )

    def build(self, teacher: Guided) -> Method:
        """The method, its networks initialised by the run's seed."""
        r = self.resolved
        with keyed_initialisation(r.settings.seed, r.method):
            method = METHODS[r.method](r.config, teacher, r.task, r.num_steps, r.settings.total_steps)
        for player in method.players.values():
            player.module.to(self.device)
            if player.ema:
                player.ema.module.to(self.device)
        return method

    def sampler(self, method: Method) -> Callable[[Tensor, Condition], Tensor]:
        """The method's student under its solver, as a function of noise and conditions."""

        def sample(x_T: Tensor, cond: Condition) -> Tensor:
            out = integrate(method.solver, method.student, x_T, method.levels, cond)
            assert isinstance(out, Tensor)
            return out

        return torch.no_grad()(sample)

    def _train(self, method: Method, teacher: Guided) -> TrainingBill:
        task, network = self.resolved.task, teacher.denoiser.network
        sources: dict[str, Any] = {}
        evaluations, trajectory_flops = 0, 0.0
        if "data" in method.sources:
            sources["data"] = task.split.train
        if "trajectory" in method.sources:
            store = open_store(task.recipe, teacher, self.device, progress=self.report("trajectories"))
            sources["trajectory"] = store
            evaluations, trajectory_flops = trajectory_bill(store, teacher, task, self.device)
        progress = self.report("training")
        identity = digest([self.resolved.identity, self.environment.code])
        trainer = Trainer(method, sources, self.resolved.settings, self.folder, self.device, network, identity)
        trainer.train(progress=lambda done, total, means: progress(done, total))
        bill: Bill = trainer.bill
        initial = max((p.ema.initial_weight for p in method.players.values() if p.ema), default=0.0)
        return TrainingBill(steps=trainer.step, images=bill.images, flops=bill.flops, trajectory_flops=trajectory_flops,
                            teacher_evaluations=evaluations + bill.teacher_evaluations, seconds=bill.seconds,
                            peak_memory_bytes=bill.peak_memory_bytes, ema_initial_weight=initial)  # fmt: skip

    def _exposure(self, method: Method, teacher: Guided) -> Exposure | None:
        """Exposure bias on the first batch of evaluation noise, whose teacher trajectories are made now."""
        task, steps = self.resolved.task, self.resolved.num_steps
        if steps == 1 or task.trajectory_steps % steps:
            return None
        x_T, cond = task.evaluation_inputs(0)
        count = task.spec.evaluation.batch_size
        x_T, cond, solver = x_T[:count].to(self.device), cond[:count].to(self.device), SOLVERS[task.recipe.solver]()
        with torch.no_grad():
            path = integrate(solver, teacher, x_T, few_step_levels(task.trajectory_steps), cond, save=True)
            assert isinstance(path, Trajectory)
            errors = exposure_bias(method.solver, method.student, method.teacher_points(path), method.levels, cond)
        return Exposure(on_teachers_history=errors[0], on_own_history=errors[1], n=len(x_T))

    def _latency(self, sampler: Callable, reference: Callable) -> LatencyEntry:
        task, warmup, repeats = self.resolved.task, 2, 9
        x_T, cond = task.evaluation_inputs(0)
        batch = task.spec.evaluation.latency_batch
        x_T, cond = x_T[:batch].to(self.device), cond[:batch].to(self.device)
        found = interleaved_latency(lambda: sampler(x_T, cond), lambda: reference(x_T, cond), self.device, warmup=warmup, repeats=repeats)
        ref = task.spec.reference
        return LatencyEntry(seconds=found.seconds, reference_seconds=found.reference_seconds, ratio=found.ratio,
                            reference=f"{ref.method}, {ref.num_steps} steps", batch=batch, dtype="float32", device=self.device.type,
                            threads=torch.get_num_threads(), warmup=warmup, repeats=repeats)  # fmt: skip

    def _keep(self, method: Method, samples: Tensor, reference: Tensor) -> None:
        """Writes the grid (student above teacher, same noise) and the student's weights."""
        picture = Image.fromarray(sample_grid([samples, reference]).numpy())
        write_aside(self.folder / "samples.png", lambda aside: picture.save(aside, "png"))
        if method.players:
            write_tensors(self.folder / "student.safetensors", method.student.state_dict(), {"run_id": self.resolved.run_id})

    def _record(self, **more: Any) -> Record:
        r = self.resolved
        return Record(run_id=r.run_id, task=r.task.spec.name, task_version=r.task.spec.version, method=r.method,
                      options=r.config.model_dump(mode="json"), config=r.run_settings, hashes=r.task.hashes,
                      environment=self.environment, **{"target": METHODS[r.method].target, **more})  # fmt: skip


def reference_of(task: Task) -> Resolved:
    """The run beside which every row of a task is shown."""
    wanted = task.spec.reference
    config = RunConfig(task=task.spec.name, method=wanted.method, num_steps=wanted.num_steps, options=wanted.options)
    return resolve(config, task)


def trajectory_bill(store: TrajectoryStore, teacher: Guided, task: Task, device: torch.device) -> tuple[int, float]:
    """Teacher passes and FLOPs of a whole store, counted on two trajectories made the same way."""
    x_T, cond = task.evaluation_inputs(0)
    x_T, cond, solver = x_T[:2].to(device), cond[:2].to(device), SOLVERS[store.recipe.solver]()
    with torch.no_grad(), count_passes(teacher.denoiser.network) as passes:
        flops = count_flops(lambda: integrate(solver, teacher, x_T, store.levels, cond))
    return passes.total * len(store) // 2, flops * len(store) / 2


def run(config: RunConfig, results: Path, device: torch.device, report: Report = silent, reuse: bool = False) -> tuple[Record, Record]:
    """The record of a config and the record of its task's reference, both computed where needed.

    Args:
        results: the results folder; runs go to `results/runs/`.
        reuse: take a finished record that other code made.

    Raises:
        UsageError, RunFailed, Interrupted.
    """
    resolved = resolve(config)
    beside = replace(reference_of(resolved.task), noise_sets=resolved.noise_sets)
    reference = Run(beside, results, device, report).execute(reuse)
    return Run(resolved, results, device, report).execute(reuse), reference
