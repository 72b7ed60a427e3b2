"""What a run would do: its resolved config, what is cached, MACs, and an estimate of the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from harness.data.trajectories import check_store_disk, missing_count, store_folder
from harness.methods import METHODS, Method
from harness.metrics.clip import CLIP
from harness.metrics.evaluator import Evaluator
from harness.metrics.extra import EXTRACTORS
from harness.metrics.sampling import Sampler, sampling_cost
from harness.runs.build import Reference, build, sampler_of
from harness.runs.identity import run_settings
from harness.runs.resolve import Resolved, reference_of
from harness.runs.run import Run
from harness.tasks import Task
from harness.training.estimate import rehearsal, seconds_a_step, shortest
from harness.training.trainer import MILESTONES

TIMES = 4
"""Calls of which the shortest counts."""
FEW, PATIENCE = 2, 3.0
"""Samples of a small batch, and the seconds that it may take before larger ones are left out."""
JUDGED = 2000
"""Samples whose metrics are timed."""


@dataclass(frozen=True)
class Preview:
    """What a run would do.

    Attributes:
        state: "finished", "interrupted" (it would resume) or "new".
        cached: for each part that runs share, whether it exists.
        seconds: an estimate for each missing part, from small pieces timed now, the metrics among
            them; an interrupted run counts from its start.
        disk: a sentence on the disk that missing trajectories need.
    """

    run_id: str
    state: str
    method: str
    options: dict[str, Any]
    config: dict[str, Any]
    nfe: float
    macs_per_sample: int
    cached: dict[str, bool] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    disk: str = ""


def preview(
    resolved: Resolved, results: Path, device: torch.device, reuse: bool = False
) -> Preview:
    """Looks up and times; writes nothing.

    Args:
        reuse: whether a record that other code made counts as finished.

    Raises UsageError if the disk is too small for the trajectories that are missing.
    """
    task = resolved.task
    beside = replace(
        reference_of(task), noise_sets=resolved.noise_sets, extra_features=resolved.extra_features
    )
    run, teacher = Run(resolved, results, device), task.teacher(device)
    reference = Reference(task, device, teacher=teacher)
    method = build(resolved, teacher, device)
    sampler = sampler_of(method)
    nfe, macs = sampling_cost(sampler, method.sampled_network, task, device)
    finished = run.finished_record(reuse) is not None
    state = (
        "finished" if finished else "interrupted" if (run.folder / "checkpoint").exists() else "new"
    )
    cached = {"reference record": Run(beside, results, device).finished_record(reuse) is not None}
    seconds: dict[str, float] = {}
    disk = ""
    if not finished and resolved.settings.total_steps and "trajectory" in method.sources:
        disk = check_store_disk(resolved.recipe)
    if not finished:
        known, seconds = _parts(run, reference, method, sampler)
        cached |= known
    return Preview(
        resolved.run_id,
        state,
        resolved.method,
        resolved.config.model_dump(mode="json"),
        run_settings(resolved),
        nfe,
        macs,
        cached,
        seconds,
        disk,
    )


def _parts(
    run: Run, reference: Reference, method: Method, sampler: Sampler
) -> tuple[dict[str, bool], dict[str, float]]:
    """Of an unfinished run: whether shared parts exist, and the seconds of each missing part."""
    resolved, task, device = run.resolved, run.resolved.task, run.device
    steps, n = resolved.settings.total_steps, task.spec.evaluation.samples
    samples_of = {"reference samples": n * resolved.noise_sets}
    cached = {
        "reference samples": all(reference.has_samples(k) for k in range(resolved.noise_sets))
    }
    seconds: dict[str, float] = {}
    if steps and "trajectory" in METHODS[resolved.method].sources:
        samples_of["trajectories"] = missing_count(resolved.recipe)
        cached["trajectories"] = has_trajectories(resolved)
    if missing := {part: count for part, count in samples_of.items() if not cached[part]}:
        one = timed(reference.sampler, task, device)
        seconds |= {part: one * count for part, count in missing.items()}
    one, judged = timed(sampler, task, device), metric_seconds(run, method)
    if steps and (sibling := run.sibling()):
        cached[f"student of {sibling.run_id}"] = True
    elif steps:
        seconds |= _training_seconds(resolved, one + judged["milestone"], device)
    seconds["samples"] = one * n * resolved.noise_sets
    seconds["metrics"] = judged["sample"] * n * resolved.noise_sets + judged["once"]
    return cached, seconds


def metric_seconds(run: Run, method: Method) -> dict[str, float]:
    """Seconds of the metrics: of a "sample", of a "milestone" sample, and "once" for a run.

    Real images stand for the samples. At most `JUDGED` are timed, and the rest counts in
    proportion, so that a metric of all pairs takes longer than this says.
    """
    task, device, few = run.resolved.task, run.device, 2
    spec, real = task.spec.evaluation, task.split.train.images
    count = min(spec.samples, JUDGED)
    images = real[torch.arange(count) % len(real)]
    evaluator = Evaluator(task, lambda noise_set: images, device)
    exact = None if method.solver.stochastic else sampler_of(method, grad=True)
    found = {
        "sample": shortest(lambda: evaluator.measure(evaluator.known_of_set(images, 0, exact)),
                           device, few) / count,
        "milestone": shortest(lambda: evaluator.quality(images), device, few) / count,
        "once": shortest(lambda: evaluator.floors(count), device, few),
    }  # fmt: skip
    for wanted in run.resolved.extra_features:
        extractor = EXTRACTORS[wanted.name](wanted.path, device)
        one = shortest(lambda made=extractor: made(images[:FEW]), device, few) / FEW  # type: ignore[misc]
        found["sample"] += one
        references = 0 if isinstance(extractor, CLIP) else len(task.split.reference)
        found["once"] += one * (references + evaluator.floor_n(spec.samples))
    return found


def _training_seconds(resolved: Resolved, one: float, device: torch.device) -> dict[str, float]:
    """The seconds of training and of its milestones.

    Args:
        one: the seconds of one sample and its quality.
    """
    task, settings = resolved.task, resolved.settings
    trainer = rehearsal(
        resolved.method, resolved.config, task, resolved.num_steps, settings, device
    )
    count = task.spec.evaluation.milestone_samples or task.spec.evaluation.samples
    return {
        "training": seconds_a_step(trainer) * settings.total_steps,
        "milestones": len(MILESTONES) * one * count,
    }


def estimate(missing: Sequence[Resolved], results: Path, device: torch.device) -> dict[str, float]:
    """Seconds of each part of many runs; what they share counts once.

    All share reference samples, and those of equal seed and grid share trajectories. Of runs that
    differ only in the seed, one is timed.
    """
    alike: dict[str, list[Resolved]] = {}
    for resolved in missing:
        alike.setdefault(
            replace(resolved, settings=replace(resolved.settings, seed=0)).run_id, []
        ).append(resolved)
    total: dict[str, float] = {}
    stores: dict[Path, float] = {}
    for group in alike.values():
        timed_run = min(group, key=has_trajectories)  # one whose trajectories are missing, if any
        for part, seconds in preview(timed_run, results, device).seconds.items():
            if part == "reference samples":
                total[part] = max(total.get(part, 0.0), seconds)
            elif part == "trajectories":
                unbuilt = [r.recipe for r in group if not has_trajectories(r)]
                stores |= {store_folder(recipe): seconds for recipe in unbuilt}
            else:
                total[part] = total.get(part, 0.0) + seconds * len(group)
    return total | ({"trajectories": sum(stores.values())} if stores else {})


def has_trajectories(resolved: Resolved) -> bool:
    """Whether the store of a run's trajectories is complete."""
    return not missing_count(resolved.recipe)


def timed(sampler: Sampler, task: Task, device: torch.device) -> float:
    """Seconds per sample: the shortest of several batches, small ones if a sample takes long."""
    x_T, cond = task.evaluation_inputs(0)
    size = min(task.spec.evaluation.batch_size, 100)

    def call(count: int) -> Callable[[], object]:
        part = slice(0, count)
        return lambda: sampler(
            x_T[part].to(device), cond[part].to(device), lambda name: x_T[part].to(device)
        )

    small = shortest(call(FEW), device, 2)
    return small / FEW if small > PATIENCE else shortest(call(size), device, TIMES) / size
