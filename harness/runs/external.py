"""Records of work from elsewhere: a file of samples, a student's weights, or a function.

The author states the bill; samples alone have no measured cost either. Metrics have the same
identities as in other records, so a report never puts different numbers of samples in one column.
"""

from __future__ import annotations

import importlib
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.errors import UsageError
from harness.files import file_hash
from harness.metrics.evaluator import Evaluator
from harness.metrics.sampling import sample_set
from harness.provenance import capture_environment
from harness.records import Metric, Record, write_record
from harness.runs.build import Reference
from harness.runs.config import RunConfig
from harness.runs.identity import outside_run_id
from harness.runs.log import Report, silent
from harness.runs.resolve import Parent, Resolved, resolve
from harness.runs.run import Run
from harness.solvers import Noise
from harness.tasks import Task

NOT_OURS = "not trained here"
BROKEN = (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)
"""What reading a damaged .npz file may raise; TypeError comes from a bare array."""


def from_outside(record: Record) -> bool:
    """Whether the work of a record was only evaluated here, not trained."""
    return any(flag.startswith(NOT_OURS) for flag in record.flags)


@dataclass(frozen=True)
class Outside:
    """What an author states about work from elsewhere.

    Attributes:
        name: name of the work in tables.
        num_steps: number of its sampling steps.
        stated: its bill, in the author's words.
    """

    name: str
    num_steps: int
    stated: str = ""

    @property
    def flags(self) -> list[str]:
        return [f"{NOT_OURS}; bill as stated: {self.stated or 'nothing'}"]


def read_samples(path: Path, task: Task) -> tuple[Tensor, Tensor | None]:
    """Reads samples and labels from an ADM-style file.

    The file holds `arr_0`, uint8 [n, H, W, C], and optionally `arr_1`, labels [n].

    Returns:
        Images [n, C, H, W] in [-1, 1], and the labels [n] or None.

    Raises UsageError if the file is broken or its images do not fit the task.
    """
    images, labels = _arrays(path)
    channels, height, width = task.shape
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[1:] != (height, width, channels)
        or len(images) < 2
    ):
        raise UsageError(
            f"{path}: arr_0 is {images.dtype} {list(images.shape)}, "
            f"but task {task.spec.name} needs uint8 [n, {height}, {width}, {channels}]"
        )
    if labels is not None and (
        labels.shape != (len(images),) or not 0 <= labels.min() <= labels.max() < task.num_classes
    ):
        raise UsageError(
            f"{path}: arr_1 should hold {len(images)} labels from 0 to {task.num_classes - 1}"
        )
    if len(images) < (least := task.spec.evaluation.kid_subset_size):
        raise UsageError(
            f"{path} holds {len(images)} samples, but task {task.spec.name} needs at least {least}"
        )
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels, None if labels is None else torch.from_numpy(labels).long()


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """`arr_0` and `arr_1` of a file. Raises UsageError if it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return content["arr_0"], content.get("arr_1", None)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except BROKEN as error:
        raise UsageError(
            f"{path} is not a file of samples; it should be .npz with arr_0, uint8 [n, H, W, C]"
        ) from error


def load_function(path: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A function named module:function. Raises UsageError if there is none."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"callable {path!r} cannot be loaded ({error}); give module:function"
        ) from error


def _evaluator(task: Task, results: Path, device: torch.device, report: Report) -> Evaluator:
    return Evaluator(task, Reference(task, device, report).samples, device)


def _record(
    task: Task,
    outside: Outside,
    content: str,
    noise_sets: int,
    metrics: dict[str, Metric],
    device: torch.device,
) -> Record:
    config = {
        "num_steps": outside.num_steps,
        "seed": 0,
        "total_steps": 0,
        "batch_size": 0,
        "micro_batch_size": None,
        "precision": "fp32",
        "compile": False,
        "noise_sets": noise_sets,
        "init_from": None,
        "extra_features": "",
    }
    return Record(
        run_id=outside_run_id(task, outside.name, content, config),
        task=task.spec.name,
        task_version=task.spec.version,
        method=outside.name,
        options={},
        config=config,
        target="as stated",
        hashes={**task.hashes, "evaluated": content},
        status="finished",
        metrics=metrics,
        flags=outside.flags,
        environment=capture_environment(device),
    )


def evaluate_samples(
    path: Path,
    outside: Outside,
    task: Task,
    results: Path,
    device: torch.device,
    report: Report = silent,
) -> Record:
    """The record of a file of samples from unknown noise.

    Without labels in the file, metrics that need labels are left out.
    """
    images, labels = read_samples(path, task)
    metrics = _evaluator(task, results, device, report).of_file(images, labels)
    return _written(_record(task, outside, file_hash(path), 1, metrics, device), results)


def evaluate_callable(
    path: str,
    outside: Outside,
    task: Task,
    results: Path,
    device: torch.device,
    report: Report = silent,
) -> Record:
    """The record of a function, evaluated on the task's noise.

    Args:
        path: MODULE:FUNCTION. The function maps noise [B, C, H, W] and labels [B] to samples
            [B, C, H, W] in [-1, 1].
    """
    function = load_function(path)

    def sampler(x_T: Tensor, cond: Condition, noise: Noise) -> Tensor:
        images = function(x_T, cond.classes if cond.text is None else cond.text)
        if not isinstance(images, Tensor) or images.shape != x_T.shape:
            found = (
                f"{tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            )
            raise UsageError(
                f"callable {path!r} gives {found} for noise {tuple(x_T.shape)}; "
                "it should give samples of that shape"
            )
        return images

    sets = range(task.spec.evaluation.noise_sets)
    samples = {
        k: sample_set(sampler, task, k, device, report(f"sampling, noise set {k}")) for k in sets
    }
    metrics = _evaluator(task, results, device, report).evaluate(samples)
    return _written(_record(task, outside, path, len(sets), metrics, device), results)


def evaluate_student(
    path: Path,
    config: RunConfig,
    outside: Outside,
    results: Path,
    device: torch.device,
    report: Report = silent,
) -> Record:
    """The record of a student's weights (safetensors) under the sampler of a method.

    The cost of sampling is measured here.
    """
    resolved: Resolved = resolve(config.model_copy(update={"budget": "steps=0"}), results=results)
    if not path.is_file():
        raise UsageError(f"there is no file of weights {path}")
    sha256 = file_hash(path)
    parent = Parent(
        run_id=path.name,
        weights=path,
        sha256=sha256,
        setting=f"{outside.name} {sha256[:8]}",
        bill=None,
    )
    run = Run(replace(resolved, parent=parent), results, device, report)
    record = run.execute()
    cost = record.cost.model_copy(update={"training": None}) if record.cost else None
    flags = list(dict.fromkeys([*record.flags, *outside.flags]))
    return _written(record.model_copy(update={"flags": flags, "cost": cost}), results)


def _written(record: Record, results: Path) -> Record:
    write_record(results / "runs" / record.run_id / "record.json", record)
    return record
