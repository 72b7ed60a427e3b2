"""Records of work from elsewhere: a file of samples, a student's weights, or a function.

The author states the bill; samples alone have no measured cost either. Metrics have the same
identities as in other records, so a report never puts different numbers of samples in one column.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from harness.data.geneval import RESULTS, PromptFolders, read_pictures, write_results
from harness.data.pictures import Pictures
from harness.diffusion.conditions import Condition
from harness.errors import UsageError
from harness.files import check_name, digest, file_hash
from harness.metrics.elsewhere import result_lines
from harness.metrics.evaluator import Evaluator
from harness.metrics.sampling import Sampler, sample_set
from harness.provenance import capture_environment
from harness.records import Metric, Record, write_record
from harness.runs.build import Reference
from harness.runs.config import RunConfig
from harness.runs.identity import outside_run_id
from harness.runs.locks import held
from harness.runs.log import Report, silent
from harness.runs.resolve import Parent, Resolved, resolve
from harness.runs.run import Run
from harness.runs.saving import Form, check_pictures, forget_sets, save_pictures, save_sets
from harness.solvers import Noise
from harness.tasks import Task

NOT_OURS = "not trained here"
STATED = "bill as stated: "


def from_outside(record: Record) -> bool:
    """Whether the work of a record was only evaluated here, not trained."""
    return any(flag.startswith(NOT_OURS) for flag in record.flags)


def stated_bill(record: Record) -> str:
    """The bill of work from elsewhere in its author's words; "" for a run of ours."""
    return next((flag.partition(STATED)[2] for flag in record.flags if NOT_OURS in flag), "")


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

    def __post_init__(self) -> None:
        check_name(self.name, "--name")

    @property
    def flags(self) -> list[str]:
        return [f"{NOT_OURS}; {STATED}{self.stated or 'nothing'}"]


def read_samples(path: Path, task: Task) -> Pictures:
    """The pictures of an ADM-style `.npz` file, of a folder of PNG, or of GenEval's layout.

    A file holds `arr_0`, uint8 [n, H, W, C], and optionally `arr_1`, labels [n]. A folder has a
    subfolder for each class if labels are known, or for each prompt.

    Raises UsageError if they are broken or do not fit the task.
    """
    found = read_pictures(path, task.num_classes)
    channels, height, width = task.picture_shape or task.shape
    sized = not task.own_classifier and found.shape[0] in (1, 3)
    if found.shape != (channels, height, width) and not sized:
        c, h, w = found.shape
        raise UsageError(
            f"{path} holds pictures of {h} x {w} with {c} channels, "
            f"but task {task.spec.name} needs {height} x {width} with {channels}"
        )
    if len(found) < (least := max(2, task.spec.evaluation.kid_subset_size)):
        raise UsageError(
            f"{path} holds {len(found)} samples, but task {task.spec.name} needs at least {least}"
        )
    labels = found.labels
    if labels is not None and (
        labels.shape != (len(found),) or not 0 <= labels.min() <= labels.max() < task.num_classes
    ):
        raise UsageError(
            f"{path}: arr_1 should hold {len(found)} labels from 0 to {task.num_classes - 1}"
        )
    return found


def load_function(path: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A function named module:function; modules of the current directory are found too.

    Raises UsageError if there is none.
    """
    module, _, name = path.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name)
        if not callable(found):
            raise TypeError(f"{name} is a {type(found).__name__}")
        return found
    except Exception as error:  # a module from outside may raise anything
        raise UsageError(
            f"callable {path!r} cannot be loaded ({error}); give module:function"
        ) from error


def source_digest(function: Callable[..., Tensor], path: str) -> str:
    """SHA-256 of a function's path and of the files of its modules: the named and the defining one.

    Of a module without a file the path alone counts. What modules import does not count.
    """
    names = {path.partition(":")[0], getattr(function, "__module__", None) or ""}
    found = {getattr(sys.modules.get(name), "__file__", None) for name in names}
    files = [Path(file) for file in found if file]
    return digest([path, sorted(file_hash(file) for file in files if file.is_file())])


def outside_record(
    task: Task,
    outside: Outside,
    hashes: dict[str, str],
    noise_sets: int,
    metrics: dict[str, Metric],
    device: torch.device,
    caveats: Sequence[str] = (),
) -> Record:
    """The record of work from elsewhere.

    Args:
        hashes: SHA-256 of what the numbers rest on; "evaluated" is that of the work.
        caveats: further flags.
    """
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
        run_id=outside_run_id(task, outside.name, hashes, config),
        task=task.spec.name,
        task_version=task.spec.version,
        method=outside.name,
        options={},
        config=config,
        target="as stated",
        hashes=hashes,
        status="finished",
        metrics=metrics,
        flags=[*outside.flags, *caveats],
        environment=capture_environment(device),
    )


def evaluate_samples(
    path: Path,
    outside: Outside,
    task: Task,
    results: Path,
    device: torch.device,
    report: Report = silent,
    save: Form | None = None,
) -> Record:
    """The record of a file or folder of samples from unknown noise.

    Without labels or prompts in it, metrics that need them are left out. Where the task's detector
    judges a folder in GenEval's layout, its result lines stand beside the record.

    Args:
        save: the form in which the samples are written beside the record, if they are.
    """
    pictures = read_samples(path, task)
    check_pictures(pictures, save)
    evaluator = Evaluator(task, nothing_known, device, report=report)
    known = evaluator.known_of_pictures(pictures)
    metrics = evaluator.of_pictures(pictures, known)
    hashes = {**task.hashes, "evaluated": pictures.sha256}
    record = outside_record(task, outside, hashes, 1, metrics, device)
    with held(results, record.run_id, wait=True):
        if isinstance(pictures, PromptFolders) and "reading" in known:
            lines = result_lines(pictures, known["reading"])
            write_results(results / "runs" / record.run_id / RESULTS, lines)
        if save:
            save_pictures(results / "runs" / record.run_id, pictures, save)
        return written_record(record, results)


def nothing_known(noise_set: int) -> Tensor:
    """The teacher's samples from noise that nobody knows."""
    raise NotImplementedError(f"samples of noise set {noise_set} are of unknown noise")


def evaluate_callable(
    path: str,
    outside: Outside,
    task: Task,
    results: Path,
    device: torch.device,
    report: Report = silent,
    save: Form | None = None,
) -> Record:
    """The record of a function, evaluated on the task's noise.

    Args:
        path: MODULE:FUNCTION. The function maps noise [B, C, H, W] and labels [B] to samples
            [B, C, H, W]: images in [-1, 1], or latents.
        save: as in `evaluate_samples`.
    """
    function = load_function(path)
    sampler = _checked(function, path)
    sets = range(task.spec.evaluation.noise_sets)
    samples = {
        k: sample_set(sampler, task, k, device, report(f"sampling, noise set {k}")) for k in sets
    }
    reference = Reference(task, device, report).samples
    evaluator = Evaluator(task, reference, device, report=report)
    metrics = evaluator.evaluate(samples)
    content = source_digest(function, path)
    hashes = {**task.hashes, "evaluated": content}
    flags = evaluator.beside_teacher(samples[0])
    record = outside_record(task, outside, hashes, len(sets), metrics, device, flags)
    folder = results / "runs" / record.run_id
    with held(results, record.run_id, wait=True):
        forget_sets(folder)
        if save:
            save_sets(folder, task, sets, samples.__getitem__, save, device)
        return written_record(record, results)


def _checked(function: Callable[[Tensor, Tensor], Tensor], path: str) -> Sampler:
    """A function as a sampler, which raises UsageError for samples of another shape."""

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

    return sampler


def evaluate_student(
    path: Path,
    config: RunConfig,
    outside: Outside,
    results: Path,
    device: torch.device,
    report: Report = silent,
    save: Form | None = None,
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
    run = Run(replace(resolved, parent=parent), results, device, report, save=save)
    record = run.execute()
    cost = record.cost.model_copy(update={"training": None}) if record.cost else None
    flags = list(dict.fromkeys([*record.flags, *outside.flags]))
    return written_record(record.model_copy(update={"flags": flags, "cost": cost}), results)


def written_record(record: Record, results: Path) -> Record:
    """Writes a record into its run's folder, and returns it."""
    write_record(results / "runs" / record.run_id / "record.json", record)
    return record
