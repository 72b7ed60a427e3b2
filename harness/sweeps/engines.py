"""Engines: child processes of a sweep on this machine, under Slurm or on a Ray cluster.

A child makes one run. It stops, after a checkpoint, when its stdin closes: so no child outlives the
process that started it. A driver asks an engine from K threads, and keeps K runs in flight. This
module imports no torch, since jobs of Slurm and workers of Ray load it too.
"""

from __future__ import annotations

import itertools
import os
import queue
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Job:
    """A child process.

    Attributes:
        words: the command line after `python -m harness`.
        cwd: its working directory, against which its relative paths count.
        environment: variables to set.
    """

    words: tuple[str, ...]
    cwd: str = field(default_factory=os.getcwd)
    environment: Mapping[str, str] = field(
        default_factory=lambda: {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("HARNESS_", "WANDB_", "TRACKIO_"))
            and not name.endswith(("KEY", "TOKEN"))  # engines write jobs to disk
        }
    )


class Died(Exception):
    """A job ended without an answer."""


def run_child(
    job: Job, share: Mapping[str, str] | None = None, stopping: threading.Event | None = None
) -> int:
    """Runs a job in a child of this process and returns its exit code, negative for a signal.

    Args:
        share: further variables, such as the child's share of threads.
        stopping: ends the child when it is set.
    """
    command, stopping = [sys.executable, "-m", "harness", *job.words], stopping or threading.Event()
    environment = {**os.environ, **job.environment, **(share or {})}
    child = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=job.cwd, env=environment)
    with child, suppress(KeyboardInterrupt):  # by which Ray and submitit cancel
        while child.poll() is None and not stopping.wait(0.05):
            pass  # leaving the block closes the child's stdin, then waits for the child
    return child.returncode


class Engine(ABC):
    """Runs jobs; `run` is called from several threads."""

    @abstractmethod
    def run(self, job: Job) -> int:
        """The exit code of a job, which this waits for. Raises Died if it cannot be known."""

    @abstractmethod
    def stop(self) -> None:
        """Ends the jobs under way; each writes a checkpoint."""


class Local(Engine):
    """Child processes of this one.

    Args:
        shares: variables for each of the runs in flight, such as `OMP_NUM_THREADS`.
    """

    def __init__(self, shares: Sequence[Mapping[str, str]]):
        self.stopping, self.shares = threading.Event(), queue.SimpleQueue[Mapping[str, str]]()
        for share in shares:
            self.shares.put(share)

    def run(self, job: Job) -> int:
        share = self.shares.get()
        try:
            return run_child(job, share, self.stopping)
        finally:
            self.shares.put(share)

    def stop(self) -> None:
        self.stopping.set()


class Slurm(Engine):
    """Jobs of a cluster, by submitit.

    Args:
        folder: for what jobs print.
        parameters: submitit's, such as timeout_min; `cluster` is "slurm", or "local" for a trial.

    Raises UsageError without submitit, without the cluster, and for unknown parameters.
    """

    def __init__(self, folder: Path, parameters: Mapping[str, Any]):
        try:
            import submitit
        except ImportError as error:
            raise UsageError(
                "--engine slurm needs submitit: install distillation-harness[slurm]"
            ) from error
        given = {"cluster": "slurm", "timeout_min": 24 * 60, **parameters}
        self.errors = (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError)
        self.jobs: set[Any] = set()
        self.submitting, self.stopped = threading.Lock(), False
        try:
            self.executor = submitit.AutoExecutor(folder=folder, cluster=given.pop("cluster"))
            self.executor.update_parameters(**given)
        except (RuntimeError, ValueError, OSError, NameError, AssertionError) as error:
            raise UsageError(f"cannot use Slurm: {_first_line(error)}") from error

    def run(self, job: Job) -> int:
        try:
            with self.submitting:
                if self.stopped:
                    raise Died("the driver stops")
                submitted = self.executor.submit(run_child, job)
                self.jobs.add(submitted)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            raise UsageError(f"cannot submit a job: {_first_line(error)}") from error
        try:
            return submitted.result()
        except self.errors as error:
            raise Died(_first_line(error)) from error
        finally:
            self.jobs.discard(submitted)

    def stop(self) -> None:
        with self.submitting:
            self.stopped = True
            for job in list(self.jobs):
                job.cancel(check=False)


class Ray(Engine):
    """Tasks of a running Ray cluster.

    Args:
        options: Ray's for a task, such as num_cpus or num_gpus.

    Raises UsageError without Ray, and where no cluster is running.
    """

    def __init__(self, options: Mapping[str, Any]):
        try:
            import ray
        except ImportError as error:
            raise UsageError("--engine ray needs Ray: install distillation-harness[ray]") from error
        try:
            ray.init(address="auto", log_to_driver=True)
        except (ConnectionError, RuntimeError) as error:
            raise UsageError(
                "no Ray cluster answers: start one by `ray start --head`, or name it in RAY_ADDRESS"
            ) from error
        self.ray, self.tasks = ray, set[Any]()
        self.submitting, self.stopped = threading.Lock(), False
        self.function = ray.remote(run_child).options(**{"max_retries": 0, **options})

    def run(self, job: Job) -> int:
        with self.submitting:
            if self.stopped:
                raise Died("the driver stops")
            task = self.function.remote(job)
            self.tasks.add(task)
        try:
            return self.ray.get(task)
        except self.ray.exceptions.RayError as error:
            raise Died(str(error).strip().splitlines()[-1]) from error
        finally:
            self.tasks.discard(task)

    def stop(self) -> None:
        with self.submitting:
            self.stopped = True
            for task in list(self.tasks):
                self.ray.cancel(task)  # with force, Ray would kill it before its checkpoint


def shares_of(device: torch.device, workers: int) -> list[dict[str, str]]:
    """Variables for each of K children of this machine: its part of the threads, and a GPU."""
    import torch

    shares = [
        {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // workers))} for _ in range(workers)
    ]
    if device.type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(
            map(str, range(torch.cuda.device_count()))
        )
        cards = visible.split(",")
        cards = cards if device.index is None else [cards[device.index]]
        for share, card in zip(shares, itertools.cycle(cards), strict=False):
            share["CUDA_VISIBLE_DEVICES"] = card
    return shares


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
