"""One run: from a config to a record. Floor 7: ties tasks, methods, trainer and evaluator together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from harness.data.trajectories import cached_samples, open_store, samples_folder
from harness.diffusion.conditions import Condition
from harness.diffusion.counting import count_flops
from harness.diffusion.denoiser import Guided
from harness.diffusion.randomness import keyed_initialisation
from harness.diffusion.schedules import few_step_levels
from harness.errors import HarnessError, RunFailed
from harness.files import digest, read_tensors, write_aside, write_tensors
from harness.methods import METHODS, Method
from harness.metrics.compute import parameters
from harness.metrics.evaluator import Sampler, evaluator_of, sample_grid, sample_set, sampling_cost
from harness.metrics.exposure import exposure_bias
from harness.metrics.extractors import EXTRACTORS
from harness.metrics.latency import interleaved_latency
from harness.networks.passes import count_passes
from harness.provenance import capture_environment, code_digest
from harness.records import (
    Cost,
    Environment,
    Exposure,
    LatencyEntry,
    Milestone,
    Record,
    TrainingBill,
    read_record,
    write_record,
)
from harness.runs.config import Resolved, reference_of
from harness.runs.locks import held
from harness.runs.log import Report, logged, logging_report, silent
from harness.solvers import SOLVERS, Noise, Trajectory, integrate
from harness.tasks import Task
from harness.training.trainer import Bill, Trainer, check_compiler

EMA_WEIGHT_FLAG = 0.01


@dataclass
class Run:
    """A resolved run and the folder `results/runs/<run_id>/` it lives in."""

    resolved: Resolved
    results: Path
    device: torch.device
    report: Report = silent
    judge: Callable[[float, dict[str, float]], None] | None = None
    """Called at the milestones with the part of the budget and the quality there; it may raise RunFailed."""
    environment: Environment = field(init=False)

    @property
    def folder(self) -> Path:
        return self.results / "runs" / self.resolved.run_id

    @property
    def locks(self) -> list[str]:
        """The names locked while this run is made: its own, and its student's if several numbers of steps share it."""
        r = self.resolved
        if not METHODS[r.method].trained_once(r.config) or not r.settings.total_steps:
            return [r.run_id]
        student = {name: value for name, value in r.identity.items() if name not in ("num_steps", "noise_sets", "extra_features")}
        return [r.run_id, f"student-{r.method}-{digest(student)[:10]}"]

    def finished_record(self, any_code: bool = False) -> Record | None:
        """The record of this run if it finished on this kind of device, made by the same code (or by any)."""
        path = self.folder / "record.json"
        if not path.exists():
            return None
        record = read_record(path)
        here = capture_environment(self.device)
        same = record.environment.device == here.device and (any_code or record.environment.code == here.code)
        return record if record.status == "finished" and same else None

    def sibling(self) -> Record | None:
        """A finished run that trained this very student to evaluate it at another number of steps, if there is one."""
        r = self.resolved
        if not METHODS[r.method].trained_once(r.config) or not r.settings.total_steps:
            return None
        for path in sorted(self.folder.parent.glob(f"{r.method}-*/student.safetensors")):
            config = read_record(path.parent / "record.json").config if (path.parent / "record.json").exists() else {}
            counts = {name: config.get(name, 0) for name in ("num_steps", "noise_sets")}
            there = replace(self, resolved=replace(r, **counts))
            if there.folder == path.parent != self.folder:  # equal in all else: the name is the hash of everything
                record = there.finished_record()
                if record is not None and not record.trained_in:
                    return record
        return None

    def execute(self, reuse: bool = False, wait: bool = False) -> Record:
        """The record of this run: the finished one, or trained (resuming an interrupted run) and evaluated now.

        Args:
            reuse: take a finished record that other code made.
            wait: whether to wait for another process that makes this run; otherwise Busy is raised.

        A run that fails writes a record with its reason, then raises RunFailed.
        """
        if (record := self.finished_record(reuse)) is not None:
            return record
        with held(self.results, *self.locks, wait=wait):
            if (record := self.finished_record(reuse)) is not None:  # made while this waited
                return record
            self.folder.mkdir(parents=True, exist_ok=True)
            with logged(self.folder / "run.log", f"run {self.resolved.run_id}") as log:
                return replace(self, report=logging_report(self.report, log))._execute()

    def _execute(self) -> Record:
        if self.resolved.settings.compile:
            check_compiler()
        self.environment = capture_environment(self.device)
        try:
            record = self._train_and_evaluate()
        except Exception as error:
            if isinstance(error, HarnessError) and not isinstance(error, RunFailed):
                raise  # what was asked for is wrong, or it was interrupted
            reason = str(error) if isinstance(error, (RunFailed, ValueError)) else f"{type(error).__name__}: {error}"
            self.record_failure(reason)
            raise RunFailed(f"run {self.resolved.run_id} failed: {reason}") from error
        write_record(self.folder / "record.json", record)
        shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)
        return record

    def record_failure(self, reason: str) -> Record:
        """Writes and returns the record of a run that could not be finished."""
        self.environment = capture_environment(self.device)
        record = self._record(status="failed", reason=reason)
        write_record(self.folder / "record.json", record)
        return record

    def samples(self, sampler: Sampler, noise_set: int) -> Tensor:
        """Samples of a noise set, [N, C, H, W]; a training-free run's are kept in the cache."""

        def compute() -> Tensor:
            progress = self.report(f"sampling, noise set {noise_set}")
            return sample_set(sampler, self.resolved.task, noise_set, self.device, progress)

        if self.resolved.settings.total_steps:
            return compute()
        return cached_samples(self._samples_key(noise_set), compute)

    def samples_folder(self, noise_set: int) -> Path:
        """Where a training-free run's samples of a noise set are cached."""
        return samples_folder(self._samples_key(noise_set))

    def _samples_key(self, noise_set: int) -> dict[str, Any]:
        identity = {k: v for k, v in self.resolved.identity.items() if k not in ("noise_sets", "extra_features")}
        return {**identity, "set": noise_set, "device": self.device.type, "code": code_digest("methods", "metrics")}

    def _train_and_evaluate(self) -> Record:
        r, task = self.resolved, self.resolved.task
        teacher = task.teacher(self.device)
        method = self.build(teacher)
        sampler = self.sampler(method)
        reference = Run(reference_of(task), self.results, self.device, self.report)
        reference_sampler = reference.sampler(reference.build(teacher))
        extra = [EXTRACTORS[wanted.name](wanted.path, self.device) for wanted in r.extra_features]
        evaluator = evaluator_of(task, lambda k: reference.samples(reference_sampler, k), self.device, extra)
        sibling = self.sibling()
        if sibling:
            self.report(f"student of {sibling.run_id}, trained before")(1, 1)
            method.start_from(read_tensors(self.folder.parent / sibling.run_id / "student.safetensors"))
        trainer = self._trainer(method, teacher) if r.settings.total_steps and not sibling else None
        count = task.spec.evaluation.milestone_samples
        if trainer:
            progress = self.report("training")
            trainer.train(progress=lambda done, total, means: progress(done, total), measure=lambda:
                          self._judged(trainer, evaluator.quality(sample_set(sampler, task, 0, self.device, count=count))))  # fmt: skip
        samples = {k: self.samples(sampler, k) for k in range(r.noise_sets)}
        measuring = self.report("metrics")
        metrics = evaluator.evaluate(samples, None if method.solver.stochastic and r.num_steps > 1 else self.sampler(method, grad=True))
        bill = self._bill(trainer, method, teacher) if trainer or r.parent else None
        if sibling and sibling.cost:
            bill = sibling.cost.training
        if trainer:
            trainer.note_quality(evaluator.quality(samples[0][:count]))
            trainer.write_curves()
        nfe, macs = sampling_cost(sampler, method.passes_through, task, self.device)
        measuring(1, 1)
        measuring = self.report("latency")
        latency = self._latency(sampler, reference_sampler)
        measuring(1, 1)
        self._keep(method, samples[0], reference.samples(reference_sampler, 0))
        exposure = self._exposure(method, teacher)
        flags = []
        if bill and bill.steps and bill.ema_initial_weight > EMA_WEIGHT_FLAG:
            flags.append(f"the evaluated average still holds {bill.ema_initial_weight:.1%} of the initial weights")
        if r.settings.precision == "bf16" and task.prediction_type == "eps" and r.settings.total_steps:
            flags.append("bf16 losses on a network that predicts eps: at the noisiest level x_0 carries 157 times its rounding")
        if method.players and not bill:
            flags.append("untrained: the student as it starts")
        cost = Cost(parameters=parameters(method.passes_through), nfe=nfe, macs_per_sample=macs,
                    latency=latency, training=bill)  # fmt: skip
        levels = [round(float(method_time), 4) for method_time in task.schedule.network_time(method.levels[:-1])]
        first = {name: value for name, value in trainer.curve[0].items() if name != "step"} if trainer else {}
        if sibling:
            first = sibling.first_losses
        milestones = [Milestone(**point, n=count) for point in trainer.milestones] if trainer else []
        return self._record(status="finished", levels=levels, metrics=metrics, exposure=exposure, cost=cost, flags=flags,
                            target=method.target, init=method.init if task.network_teacher else "random",
                            first_losses=first, milestones=milestones, trained_in=sibling.run_id if sibling else "")  # fmt: skip

    def _judged(self, trainer: Trainer, quality: dict[str, float]) -> dict[str, float]:
        if self.judge is not None:
            self.judge(trainer.step / self.resolved.settings.total_steps, quality)
        return quality

    def build(self, teacher: Guided) -> Method:
        """The method, its networks initialised by the run's seed."""
        r = self.resolved
        with keyed_initialisation(r.settings.seed, r.method):
            method = METHODS[r.method](r.config, teacher, r.task, r.num_steps, r.settings.total_steps)
        if r.parent:
            method.start_from(read_tensors(r.parent.weights, r.parent.sha256))
        method.to(self.device)
        return method

    def sampler(self, method: Method, grad: bool = False) -> Sampler:
        """The method's student under its solver, as a function of noise and conditions; `grad` lets gradients through."""

        def sample(x_T: Tensor, cond: Condition, noise: Noise) -> Tensor:
            out = integrate(method.solver, method.student, x_T, method.levels, cond, noise)
            assert isinstance(out, Tensor)
            return out

        return sample if grad else torch.no_grad()(sample)

    def _trainer(self, method: Method, teacher: Guided) -> Trainer:
        """The trainer of this run, with what the method learns from."""
        task, sources = self.resolved.task, dict[str, Any]()
        if "data" in method.sources:
            sources["data"] = task.split.train
        if "trajectory" in method.sources:
            progress = self.report("trajectories")
            sources["trajectory"] = open_store(task.recipe, teacher, self.device, progress=progress, conditions=task.conditions)
        identity = digest([self.resolved.identity, self.environment.code])
        return Trainer(method, sources, self.resolved.settings, self.folder, self.device, teacher.denoiser.network, identity)

    def _bill(self, trainer: Trainer | None, method: Method, teacher: Guided) -> TrainingBill:
        bill, parent = trainer.bill if trainer else Bill(), self.resolved.parent
        before = parent.bill if parent else None
        evaluations, trajectory_flops = 0, 0.0
        if trainer and "trajectory" in method.sources:
            evaluations, trajectory_flops = trajectory_bill(teacher, self.resolved.task, self.device)
        initial = max((p.ema.initial_weight for p in method.players.values() if p.ema), default=0.0) if trainer else 1.0
        return TrainingBill(
            steps=trainer.step if trainer else 0,
            images=bill.images,
            flops=bill.flops,
            trajectory_flops=max(trajectory_flops, before.trajectory_flops if before else 0.0),  # the same store serves both
            teacher_evaluations=evaluations + bill.teacher_evaluations,
            seconds=bill.seconds,
            peak_memory_bytes=bill.peak_memory_bytes,
            inherited_flops=before.flops + before.inherited_flops if before else 0.0,
            inherited_images=before.images + before.inherited_images if before else 0,
            inherited_seconds=before.seconds + before.inherited_seconds if before else 0.0,
            ema_initial_weight=initial,
        )

    def _exposure(self, method: Method, teacher: Guided) -> Exposure | None:
        """Exposure bias on the first batch of evaluation noise, whose teacher trajectories are made now."""
        task, steps = self.resolved.task, self.resolved.num_steps
        on_path = torch.equal(method.levels, few_step_levels(steps))
        if steps == 1 or task.trajectory_steps % steps or method.solver.stochastic or not on_path:
            return None
        x_T, cond = task.evaluation_inputs(0)
        count = task.spec.evaluation.batch_size
        x_T, cond, solver = x_T[:count].to(self.device), cond[:count].to(self.device), SOLVERS[task.recipe.solver]()
        with torch.no_grad():
            path = integrate(solver, teacher, x_T, few_step_levels(task.trajectory_steps), cond, save=True)
            assert isinstance(path, Trajectory)
            errors = exposure_bias(method.solver, method.student, method.teacher_points(path), method.levels, cond)
        return Exposure(on_teachers_history=errors[0], on_own_history=errors[1], drift=errors[2], n=len(x_T))

    def _latency(self, sampler: Sampler, reference: Sampler) -> LatencyEntry:
        task, warmup, repeats = self.resolved.task, 2, 9
        x_T, cond = task.evaluation_inputs(0)
        batch = task.spec.evaluation.latency_batch
        x_T, cond = x_T[:batch].to(self.device), cond[:batch].to(self.device)
        mine, theirs = (lambda s=s: s(x_T, cond, lambda name: x_T) for s in (sampler, reference))
        found = interleaved_latency(mine, theirs, self.device, warmup=warmup, repeats=repeats)
        ref = task.spec.reference
        return LatencyEntry(seconds=found.seconds, reference_seconds=found.reference_seconds, ratio=found.ratio,
                            reference=f"{ref.method}, {ref.num_steps} steps", batch=batch, dtype="float32", device=self.device.type,
                            threads=torch.get_num_threads(), warmup=warmup, repeats=repeats)  # fmt: skip

    def _keep(self, method: Method, samples: Tensor, reference: Tensor) -> None:
        """Writes the grid (student above teacher, same noise) and the student's weights."""
        picture = Image.fromarray(sample_grid([samples, reference]).numpy())
        write_aside(self.folder / "samples.png", lambda aside: picture.save(aside, "png"))
        if method.players:
            average = method.student_player.ema
            assert average is not None
            write_tensors(self.folder / "student.safetensors", average.module.state_dict(), {"run_id": self.resolved.run_id})

    def _record(self, **more: Any) -> Record:
        r, cls = self.resolved, METHODS[self.resolved.method]
        return Record(run_id=r.run_id, task=r.task.spec.name, task_version=r.task.spec.version, method=r.method,
                      options=r.config.model_dump(mode="json"), config=r.run_settings, hashes=r.task.hashes,
                      environment=self.environment, **{"target": cls.target, "init": cls.init, **more})  # fmt: skip


def trajectory_bill(teacher: Guided, task: Task, device: torch.device) -> tuple[int, float]:
    """Teacher passes and FLOPs of all the task's trajectories, counted on two made the same way."""
    x_T, cond = task.evaluation_inputs(0)
    x_T, cond, solver = x_T[:2].to(device), cond[:2].to(device), SOLVERS[task.recipe.solver]()
    with torch.no_grad(), count_passes(teacher.denoiser.network) as passes:
        flops = count_flops(lambda: integrate(solver, teacher, x_T, few_step_levels(task.trajectory_steps), cond))
    return passes.total * task.recipe.count // 2, flops * task.recipe.count / 2


def run(resolved: Resolved, results: Path, device: torch.device, report: Report = silent, reuse: bool = False) -> tuple[Record, Record]:
    """The record of a resolved config and the record of its task's reference, both computed where needed.

    Args:
        results: the results folder; runs go to `results/runs/`.
        reuse: take a finished record that other code made.

    Raises:
        UsageError, RunFailed, Interrupted.
    """
    beside = replace(reference_of(resolved.task), noise_sets=resolved.noise_sets, extra_features=resolved.extra_features)
    reference = Run(beside, results, device, report).execute(reuse, wait=True)  # many runs share it
    return Run(resolved, results, device, report).execute(reuse), reference
