"""One run: from a resolved config to a record, resumable and made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import ranks
from harness.data.trajectories import check_store_disk, open_store
from harness.diffusion.denoiser import Guided
from harness.errors import HarnessError, RankLost, RunFailed, UsageError
from harness.methods import Method
from harness.metrics.evaluator import Evaluator
from harness.metrics.extra import EXTRACTORS
from harness.metrics.sampling import sample_set
from harness.networks.compiling import check_compiler, uncompiled
from harness.networks.recomputing import checkpoint_activations
from harness.progress import NOBODY, Follower, Subject
from harness.provenance import capture_environment
from harness.records import Environment, Record, TrainingBill, write_record
from harness.runs.build import Reference, build, sampler_of, samples_again, samples_of
from harness.runs.evaluation import (
    cost_of,
    flags_of,
    grid_of,
    measure_exposure,
    measure_latency,
    training_bill,
    training_curve,
    write_grid,
    write_student,
)
from harness.runs.finished import finished_record, run_folder, sibling_of, student_weights
from harness.runs.identity import checkpoint_key, run_hashes, run_settings, student_key
from harness.runs.locks import held
from harness.runs.log import Report, logged, logging_report, silent
from harness.runs.resolve import Resolved, reference_of
from harness.runs.saving import Form, forget_sets, save_sets
from harness.runs.student_file import facts_of
from harness.runs.told import followed, row_of, subject_of
from harness.training.checkpoints import is_left_over
from harness.training.levels import gradient_norms
from harness.training.power_average import PowerAverages
from harness.training.settings import PLAIN, Execution
from harness.training.sharding import check_shard, gathered_no_more, whole
from harness.training.trainer import Trainer

CPU = torch.device("cpu")
Judge = Callable[[float, dict[str, float]], None]
"""A callback at the milestones: it gets the part of the budget and the metrics there.

It may raise RunFailed to stop the run.
"""
Quality = Callable[[int], dict[str, float]]
"""Measures the student after a training step: metrics by name."""


@dataclass
class Run:
    """A resolved run and the folder `results/runs/<run_id>/` it lives in.

    Attributes:
        save: the form in which its samples are written for other evaluators; None writes none.
        execution: how the run is executed.
        follower: is told what the run finds. A finished run tells it again from its folder.
    """

    resolved: Resolved
    results: Path
    device: torch.device
    report: Report = silent
    judge: Judge | None = None
    save: Form | None = None
    execution: Execution = PLAIN
    follower: Follower = NOBODY
    environment: Environment = field(init=False)

    @property
    def folder(self) -> Path:
        return run_folder(self.resolved, self.results)

    @property
    def locks(self) -> list[str]:
        """The names that are locked while this run is made.

        They are the run's own name and, if several numbers of steps share it, its student's name.
        """
        return [
            self.resolved.run_id,
            *([student_key(self.resolved)] if self.resolved.shares_student else []),
        ]

    def finished_record(self, any_code: bool = False) -> Record | None:
        """The run's finished record; see `harness.runs.finished.finished_record`."""
        return finished_record(self.resolved, self.results, self.device, any_code)

    def sibling(self) -> Record | None:
        """The finished run of the same student; see `harness.runs.finished.sibling_of`."""
        return sibling_of(self.resolved, self.results, self.device)

    def execute(self, reuse: bool = False, wait: bool = False) -> Record:
        """Returns the run's record: the finished one, or a new one after training and evaluation.

        An interrupted run resumes. A run that fails writes a record with the reason.

        Args:
            reuse: whether a finished record of other code counts.
            wait: whether to wait for another process that makes this run.

        Raises:
            Busy: if another process makes this run and `wait` is false.
            RunFailed: if the run fails.
            UsageError, Interrupted.
        """
        with ExitStack() as stack:

            def known() -> Record | None:
                return ranks.told_by_first(lambda: self.finished_record(reuse))

            def enter() -> None:
                stack.enter_context(held(self.results, *self.locks, wait=wait))

            record = known()
            if alone := record is None or bool(self.save) or self._left_over(record):
                ranks.told_by_first(enter)
                record = known()  # another process may have finished it while this one waited
            if record is not None:
                self._save()
                self.tell(record)
                if alone and self._left_over(record):
                    ranks.told_by_first(self._forget_checkpoint)
                return record
            if not ranks.is_first():
                return replace(self, report=silent, follower=NOBODY)._execute()
            self.folder.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context(
                logged(self.folder / "run.log", f"run {self.resolved.run_id}")
            )
            code = capture_environment(self.device).code
            stack.enter_context(followed(self.follower, self._subject(code)))
            return replace(self, report=logging_report(self.report, log))._execute()

    def _subject(self, code: str) -> Subject:
        return subject_of(self.resolved, self.folder, self.results, code)

    def tell(self, record: Record) -> None:
        """Tells the follower of this run, which was finished before, from its folder."""
        if ranks.is_first() and self.folder.is_dir():
            with followed(self.follower, self._subject(record.environment.code)):
                self._tell_row(record)

    def _tell_row(self, record: Record) -> None:
        bill = record.cost.training if record.cost else None
        self.follower.done(bill.steps if bill else 0, row_of(record))

    def _execute(self) -> Record:
        if self.resolved.settings.compile:
            check_compiler()
        self.environment = capture_environment(self.device)
        try:
            record = self._train_and_evaluate()
        except Exception as error:
            if isinstance(error, HarnessError) and not isinstance(error, RunFailed):
                raise  # a wrong request or an interruption is no failure of the run
            if isinstance(error, OSError):  # nor is a full disk
                raise self._refused(error) from error
            reason = (
                str(error)
                if isinstance(error, (RunFailed, ValueError))
                else f"{type(error).__name__}: {error}"
            )
            if not (ranks.is_first() or isinstance(error, RunFailed)):
                raise RankLost(f"rank {ranks.number()}: {reason}") from error
            self._write(self._record(status="failed", reason=reason))
            raise RunFailed(f"run {self.resolved.run_id} failed: {reason}") from error
        return ranks.told_by_first(lambda: self._finish(record))

    def _refused(self, error: OSError) -> UsageError:
        """The error for a file that cannot be read or written."""
        return UsageError(
            f"run {self.resolved.run_id} stopped: {error.filename or self.folder}: "
            f"{error.strerror or error}; once that is mended, the same command goes on"
        )

    def _finish(self, record: Record) -> Record:
        """Writes the record of a finished run, which needs its checkpoint no more."""
        self._write(record)
        self._forget_checkpoint()
        self._tell_row(record)
        return record

    def _left_over(self, record: Record) -> bool:
        """Whether the checkpoint of a finished run is still there: it was killed at its end."""
        key = checkpoint_key(self.resolved, record.environment.code)
        return ranks.told_by_first(lambda: is_left_over(self.folder / "checkpoint", key))

    def _forget_checkpoint(self) -> None:
        shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)

    def _write(self, record: Record) -> None:
        if ranks.is_first():
            write_record(self.folder / "record.json", record)

    def _save(self, samples: Callable[[int], Tensor] | None = None) -> None:
        """Writes the pictures that are wanted; a finished run makes the missing ones again."""
        r, sets = self.resolved, range(self.resolved.noise_sets)

        def write() -> None:
            if samples:  # of a run that is new, or made anew
                forget_sets(self.folder)
            made = samples or samples_again(r, self.folder, self.device, self.report)
            if self.save:
                save_sets(self.folder, r.task, sets, made, self.save, self.device)

        ranks.told_by_first(write)

    def record_failure(self, reason: str) -> Record:
        """Writes and returns the record of a run that could not be finished."""
        self.environment = capture_environment(self.device)
        record = self._record(status="failed", reason=reason)
        self._write(record)
        return record

    def _train_and_evaluate(self) -> Record:
        r, task = self.resolved, self.resolved.task
        # In sharded training the parts are on the device; whole networks wait on the CPU.
        home, teacher = CPU if self.execution.shard else self.device, task.teacher(self.device)
        reference = Reference(
            task, self.device, self.report, None if self.execution.shard else teacher
        )
        extra = [EXTRACTORS[wanted.name](wanted.path, self.device) for wanted in r.extra_features]
        evaluator = Evaluator(task, reference.samples, self.device, extra, self.report)
        sibling = ranks.told_by_first(self.sibling)
        trains = bool(r.settings.total_steps) and not sibling
        method = build(r, teacher, home)
        sources = self._sources(method, teacher) if trains else {}
        teacher.denoiser.network.to(home)
        sampler = sampler_of(method)
        if sibling:
            self.report(f"student of {sibling.run_id}, trained before")(1, 1)
            method.start_from(student_weights(self.folder.parent / sibling.run_id))

        def quality(step: int) -> dict[str, float]:
            count = task.spec.evaluation.milestone_samples
            samples = sample_set(sampler, task, 0, self.device, count=count)
            found = evaluator.quality(samples)
            ranks.told_by_first(
                lambda: self.follower.picture(step, lambda: grid_of(task, self.device, samples))
            )
            return found

        trainer = None
        if trains:
            if self.execution.shard:
                self._train_sharded(method, sources, quality)
            trainer = self._trainer(method, teacher, sources, home)
            self._train(trainer, quality)
        with uncompiled(r.settings.compile):
            return self._evaluated(method, teacher, trainer, evaluator, reference, sibling)

    def _evaluated(
        self,
        method: Method,
        teacher: Guided,
        trainer: Trainer | None,
        evaluator: Evaluator,
        reference: Reference,
        sibling: Record | None,
    ) -> Record:
        """The record of a run after its training."""
        r, sampler = self.resolved, sampler_of(method)
        for network in (method.student, teacher.denoiser.network):
            network.to(self.device)
        samples = {
            k: samples_of(r, sampler, k, self.device, self.report) for k in range(r.noise_sets)
        }
        self._save(samples.__getitem__)
        bill = (
            training_bill(r, trainer, method, teacher, self.device) if trainer or r.parent else None
        )
        shared: dict[str, Any] = {}
        if sibling:
            bill = sibling.cost.training if sibling.cost else bill
            shared = {"first_losses": sibling.first_losses, "trained_in": sibling.run_id}
        measured = self._measure(method, teacher, trainer, bill, samples, evaluator, reference)
        return self._record(status="finished", **{**measured, **shared})

    def _train_sharded(self, method: Method, sources: dict[str, Any], quality: Quality) -> None:
        """Trains a sharded copy of a method to its last checkpoint, which a plain trainer reads.

        Args:
            method: the whole one, whose student visits the device at milestones.
            quality: measures that student.
        """
        teacher = self.resolved.task.teacher(CPU)
        copy = build(self.resolved, teacher, CPU)
        trainer = self._trainer(copy, teacher, sources, self.device, sharded=True)
        average = copy.student_player.ema

        def gathered(step: int) -> dict[str, float]:
            assert average is not None
            gathered_no_more(trainer.sharded)
            method.start_from(whole(average.module.state_dict()))
            method.student.to(self.device)
            found = quality(step)
            method.student.to(CPU)
            return found

        self._train(trainer, gathered)
        ranks.wait()  # until the first rank has written

    def _sources(self, method: Method, teacher: Guided) -> dict[str, Any]:
        """The sources that a method learns from."""
        task, sources = self.resolved.task, dict[str, Any]()
        if "data" in method.sources:
            sources["data"] = task.split.train
        if "trajectory" in method.sources:
            sources["trajectory"] = open_store(
                self.resolved.recipe,
                teacher,
                self.device,
                progress=self.report("trajectories"),
                conditions=task.conditions,
            )
        return sources

    def _trainer(
        self,
        method: Method,
        teacher: Guided,
        sources: dict[str, Any],
        device: torch.device,
        sharded: bool = False,
    ) -> Trainer:
        """The run's trainer."""
        r, key = self.resolved, checkpoint_key(self.resolved, self.environment.code)
        network = teacher.denoiser.network
        if self.execution.checkpoint_activations:
            checkpoint_activations(player.module for player in method.players.values())
        averages, wanted = None, self.execution.snapshots
        if wanted:
            student, every = method.student_player.module, r.settings.total_steps // wanted
            averages = PowerAverages(student, self.folder / "averages", every)
        return Trainer(
            method,
            sources,
            r.settings,
            self.folder,
            device,
            network,
            key,
            sharded,
            averages,
            self.follower,
        )

    def _train(self, trainer: Trainer, quality: Quality) -> None:
        """Trains to the end and measures quality at the milestones, where the judge may stop it.

        The first rank alone looks at noise levels, which sharded networks do not allow.
        """

        def measure() -> dict[str, float]:
            found = quality(trainer.step)
            if self.judge is not None:
                self.judge(trainer.step / self.resolved.settings.total_steps, found)
            return found

        def norms() -> dict[str, float]:
            schedule = self.resolved.task.schedule
            return gradient_norms(trainer.method, trainer.batches, schedule, trainer.step)

        def look() -> None:
            if not trainer.sharded:
                ranks.told_by_first(lambda: self.follower.levels(trainer.step, norms))

        trainer.train(progress=self.report("training"), measure=measure, look=look)

    def _measure(
        self,
        method: Method,
        teacher: Guided,
        trainer: Trainer | None,
        bill: TrainingBill | None,
        samples: dict[int, Tensor],
        evaluator: Evaluator,
        reference: Reference,
    ) -> dict[str, Any]:
        """The measured fields of a finished record; writes the grid, the weights and the curves."""
        r, task, sampler = self.resolved, self.resolved.task, sampler_of(method)
        measuring = self.report("metrics")
        deterministic = not method.solver.stochastic or r.num_steps == 1
        exact = sampler_of(method, grad=True) if deterministic else None
        metrics = evaluator.evaluate(samples, exact)
        count = task.spec.evaluation.milestone_samples
        if trainer:
            trainer.note_quality(evaluator.quality(samples[0][:count]))
            trainer.write_curves()
        measuring(1, 1)

        def rest() -> dict[str, Any]:
            measuring = self.report("latency")
            latency = measure_latency(task, sampler, reference.sampler, self.device)
            measuring(1, 1)
            write_grid(self.folder, task, self.device, samples[0], reference.samples(0))
            write_student(self.folder, method, facts_of(r).metadata())
            return {
                "exposure": measure_exposure(r, method, teacher, self.device),
                "cost": cost_of(method, task, sampler, latency, bill, self.device),
            }

        times = task.schedule.network_time(method.levels[:-1])
        return {
            "levels": [round(float(time), 4) for time in times],
            "metrics": metrics,
            **ranks.told_by_first(rest),
            "flags": [
                *flags_of(r, method, bill),
                *evaluator.beside_teacher(samples[0]),
                *evaluator.caveats(len(samples[0])),
            ],
            "target": method.target,
            "init": method.init if task.network_teacher else "random",
            **training_curve(trainer, count),
        }

    def _record(self, **more: Any) -> Record:
        r = self.resolved
        fields = {
            "run_id": r.run_id,
            "task": r.task.spec.name,
            "task_version": r.task.spec.version,
            "method": r.method,
            "options": r.config.model_dump(mode="json"),
            "config": run_settings(r),
            "hashes": run_hashes(r),
            "environment": self.environment,
            "target": r.cls.target,
            "init": r.cls.init,
        }
        return Record(**{**fields, **more})


def run(
    resolved: Resolved,
    results: Path,
    device: torch.device,
    report: Report = silent,
    reuse: bool = False,
    save: Form | None = None,
    execution: Execution = PLAIN,
    follower: Follower = NOBODY,
) -> tuple[Record, Record]:
    """The record of a resolved config and that of its task's reference, both computed where needed.

    Args:
        results: the results folder; runs go to `results/runs/`.
        reuse: whether finished records of other code count.
        save: the form in which the run's samples are written, if they are.
        execution: how the run is executed.
        follower: is told what the run finds.

    Raises:
        UsageError, RunFailed, Busy, Interrupted. UsageError comes before anything is computed if
        the disk is too small for the trajectories.
    """
    beside = replace(
        reference_of(resolved.task),
        noise_sets=resolved.noise_sets,
        extra_features=resolved.extra_features,
    )
    if execution.shard and execution.snapshots:
        raise UsageError("--snapshots needs whole networks: leave it or --shard out")
    if execution.shard:
        check_shard(resolved.cls, resolved.config)
    wanted = Run(
        resolved, results, device, report, save=save, execution=execution, follower=follower
    )
    learns = resolved.settings.total_steps and "trajectory" in resolved.cls.sources

    def check_disk() -> None:
        if learns and wanted.finished_record(reuse) is None:
            check_store_disk(resolved.recipe)

    ranks.told_by_first(check_disk)
    reference = Run(beside, results, device, report).execute(reuse, wait=True)  # many runs share it
    return wanted.execute(reuse), reference
