"""Where the time goes: `python -m benchmarks.phases TASK [METHOD]` prints two tables.

The first splits teacher training, trajectories and distillation by kind of operation. The second
gives the time of each part of evaluating a sample set. The task needs a feature network.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from harness.data.trajectories import open_store
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.diffusion.schedules import few_step_levels
from harness.methods import METHODS
from harness.metrics import METRICS
from harness.metrics.evaluator import Evaluator
from harness.solvers import SOLVERS, sample
from harness.tasks import Task, load_task
from harness.training.batches import Source
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

KINDS = {  # an operation belongs to the first kind with a word in its name
    "attention": ("scaled_dot_product", "flash", "softmax"),
    "matrix products": ("mm", "linear", "conv"),
    "GELU, norms": ("gelu", "norm", "silu", "sigmoid"),
    "copies": ("copy", "cat", "contiguous", "index", "fill", "zero"),
}
STEPS = 4
T = TypeVar("T")


def kind_of(operation: str) -> str:
    """The kind of a torch operation."""
    return next(
        (kind for kind, words in KINDS.items() if any(word in operation for word in words)),
        "the rest",
    )


def shares(call: Callable[[], object]) -> tuple[float, dict[str, float]]:
    """Seconds of a call, and the share of each kind in the time of torch's operations.

    The seconds are the median of three calls after a warm-up.
    """
    call()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    by_kind: dict[str, float] = {}
    for event in profiled.key_averages():
        if not event.key.startswith("aten::"):
            continue  # a wrapper of other operations
        by_kind[kind_of(event.key)] = (
            by_kind.get(kind_of(event.key), 0.0) + event.self_cpu_time_total
        )
    total = sum(by_kind.values())
    return statistics.median(seconds), {kind: found / total for kind, found in by_kind.items()}


def trainer_of(name: str, task: Task, source: dict[str, Source], batch_size: int) -> Trainer:
    """A trainer that has counted its FLOPs."""
    cls = METHODS[name]
    with keyed_initialisation(0, name):
        method = cls(cls.Config(), task.teacher(CPU), task, STEPS, 1000)
    return Trainer(method, source, TrainSettings(1000, batch_size, 0), None, CPU)


def one_step(trainer: Trainer) -> None:
    trainer.train(until=trainer.step + 1)


CPU = torch.device("cpu")


def main(task_name: str = "digits", method: str = "step-distillation") -> None:
    """Prints both tables."""
    task = load_task(task_name)
    teacher, network = task.teacher(CPU), task.spec.teacher
    store = open_store(task.recipe, teacher, CPU)
    index = torch.arange(task.spec.evaluation.batch_size)
    x_T, cond = Keyed("phases", 0).normal("x_T", index, task.shape), task.conditions.balanced(index)
    training = trainer_of(
        "denoising",
        task,
        {"data": task.split.train},
        network.training.batch_size if network and network.training else task.spec.batch_size,
    )
    distilling = trainer_of(
        method, task, {"trajectory": store, "data": task.split.train}, task.spec.batch_size
    )
    levels = few_step_levels(task.trajectory_steps)

    @torch.no_grad()
    def solve() -> None:
        sample(SOLVERS[task.spec.trajectories.solver](), teacher, x_T, levels, cond)

    phases = {
        f"teacher training, a step of {training.settings.batch_size}": lambda: one_step(training),
        f"trajectories, {len(index)} in {task.trajectory_steps} evaluations": solve,
        f"distillation ({method}, {STEPS} steps), a step of {task.spec.batch_size}": lambda: (
            one_step(distilling)
        ),
    }
    print(f"{task_name}, {torch.get_num_threads()} threads\n")
    print(
        f"| | seconds | {' | '.join([*KINDS, 'the rest'])} |\n|---|---|{'---|' * (len(KINDS) + 1)}"
    )
    for name, call in phases.items():
        seconds, by_kind = shares(call)
        cells = [f"{by_kind.get(kind, 0.0):.0%}" for kind in [*KINDS, "the rest"]]
        print(f"| {name} | {seconds:.3f} | {' | '.join(cells)} |", flush=True)
    print(f"\n| judging {task.spec.evaluation.samples} samples | seconds |\n|---|---|")
    for name, seconds in evaluation_seconds(task, teacher).items():
        print(f"| {name} | {seconds:.1f} |", flush=True)


def evaluation_seconds(task: Task, teacher: nn.Module) -> dict[str, float]:
    """Seconds of each part of evaluating one sample set.

    Real images stand in for samples, since only the time counts.
    """
    found = {}

    def timed(name: str, call: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = call()
        found[name] = time.perf_counter() - started
        return result

    count, train = task.spec.evaluation.samples, task.split.train
    images, labels = (
        part[torch.arange(count) % len(train)] for part in (train.images, train.labels)
    )
    evaluator = timed(
        "features of the reference, kept where they are many",
        lambda: Evaluator(task, lambda k: images, CPU),
    )
    known = timed("features", lambda: evaluator.known(images, labels))
    for name in METRICS.names():  # of metrics that share distances, the first pays for them
        if set(METRICS[name].needs) <= known.keys():
            timed(name, lambda name=name: METRICS[name](known))  # type: ignore[misc]
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
