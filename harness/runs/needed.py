"""Whether the files that a task names are there and fit, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from harness.errors import UsageError
from harness.files import check_hash, data_folder, header_of
from harness.metrics.spaces import reference_file
from harness.networks.backbones import build
from harness.networks.backbones.text import text_widths
from harness.networks.fit import check_fit
from harness.networks.said import check_said
from harness.tasks import Task
from harness.tasks.spec import InceptionFeatures, Part, PromptSpec, Weights
from harness.tasks.task_files import FOLDER

NAMED = {"cifar10": "cifar-10-batches-py", "fashion-mnist": "FashionMNIST/raw"}
"""Folders of named sets, in the data folder."""


@dataclass(frozen=True)
class Needed:
    """A file or folder that a task names.

    Attributes:
        what: data, prompts, teacher, features, autoencoder or reference.
        place: its path, or where it belongs.
        state: "there", "download" for what a run downloads by itself, "missing" or "wrong".
        note: what is wrong, or where to get what is missing.
    """

    what: str
    place: Path
    state: Literal["there", "download", "missing", "wrong"]
    note: str = ""


def needed_files(task: Task) -> list[Needed]:
    """Every file that a task names.

    Weights are compared by SHA-256, names and shapes, images by shape and labels.
    """
    return [_checked(task, what, place, check) for what, place, check in _entries(task)]


def _entries(task: Task) -> Iterator[tuple[str, Path, Callable[[], object]]]:
    """What a task names, its place, and a check that raises UsageError."""
    spec = task.spec
    if task.mixture is not None:
        return
    if place := spec.data.path or NAMED.get(spec.data.set):
        yield "data", _place(task, place), lambda: task.split
    if isinstance(spec.prompts, PromptSpec):
        prompts = _place(task, spec.prompts.file)
        yield "prompts", prompts, lambda: _check_prompts(task, prompts)
    if spec.teacher is not None:
        teacher = _place(task, spec.teacher.file)
        yield "teacher", teacher, lambda: _check_weights(task, "teacher", teacher)
    if isinstance(spec.features, Weights):
        features = _place(task, spec.features.file)
        yield "features", features, lambda: _check_weights(task, "features", features)
    elif spec.features is not None:
        published = _published(task)
        yield "features", published, lambda: check_hash(published, spec.features.sha256)  # type: ignore[union-attr]
    if autoencoder := spec.autoencoder:
        folder = _place(task, autoencoder.folder)
        yield "autoencoder", folder, lambda: (task.picture_shape, task.autoencoder_hash)
    if reference := spec.evaluation.reference_npz:
        yield "reference", _place(task, reference.file), lambda: reference_file(task)


def _checked(task: Task, what: str, place: Path, check: Callable[[], object]) -> Needed:
    if not place.exists():
        spec = task.spec
        published = isinstance(spec.features, InceptionFeatures) and not spec.features.file
        fetched = (what == "data" and not spec.data.path) or (what == "features" and published)
        note = spec.sources.get(what, "")
        return Needed(what, place, "download" if fetched else "missing", note)
    try:
        check()
    except UsageError as error:
        return Needed(what, place, "wrong", str(error))
    return Needed(what, place, "there")


def _place(task: Task, name: str) -> Path:
    """Where a file is. One that is nowhere belongs to the data, or beside a task's own file."""
    beside = (task.folder or FOLDER) / name
    places = [beside, FOLDER / name, data_folder() / name]
    missing = beside if beside != places[1] and beside.parent.is_dir() else places[2]
    return next((place for place in places if place.exists()), missing)


def _published(task: Task) -> Path:
    """The file of weights of a published feature network."""
    features = task.spec.features
    assert features is not None
    if not isinstance(features, InceptionFeatures) or features.file:
        return _place(task, str(features.file))
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]


def _check_prompts(task: Task, path: Path) -> None:
    """Compares the shapes of a table of prompts with what the network reads, by its header."""
    spec, (width, pooled) = task.spec.prompts, text_widths(task.network_options)
    assert isinstance(spec, PromptSpec)
    check_hash(path, spec.sha256)
    shapes = header_of(path)[1]
    length = spec.length or shapes.get("table", (0, 0))[1]
    wanted = {"table": (length, width)} | ({"table_pooled": (pooled,)} if pooled else {})
    for name, shape in wanted.items():
        if (found := shapes.get(name, ())[1:]) != shape:
            raise UsageError(
                f"{path} has prompts with {name} of {list(found)}, but task {task.spec.name} "
                f"needs {list(shape)}: another text encoder made it"
            )
    if "null" not in shapes:
        raise UsageError(f"{path} lacks null, the empty prompt: harness data prompts writes both")


def _check_weights(task: Task, part: Part, path: Path) -> None:
    """Compares a file of weights with the network that reads it, by its header."""
    check_hash(path, task.made(part))
    with torch.device("meta"):
        network = build(task.network_options) if part == "teacher" else task.new_classifier()
    found = {n: torch.empty(shape, device="meta") for n, shape in header_of(path)[1].items()}
    check_fit(network.state_dict(), found, str(path))
    if part == "teacher":
        check_said(path, task.spec.network, task.spec.schedule, task.spec.prediction_type)
