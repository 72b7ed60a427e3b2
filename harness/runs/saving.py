"""Samples of a run as files for other evaluators: ADM's `.npz`, or PNG by class."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from harness.data.pictures import Pictures, write_npz, write_pngs
from harness.errors import UsageError
from harness.metrics.pixels import AT_ONCE, Pixels
from harness.tasks import Task

Form = Literal["npz", "png"]
"""`samples-K.npz`, or a folder `samples-K` with PNG by class, for noise set K."""


def check_form(form: str | None, task: Task) -> Form | None:
    """The form of files. Raises UsageError for an unknown one, and for samples that are no images.

    Args:
        form: a word; None saves nothing.
    """
    if form is None:
        return None
    for known in get_args(Form):
        if form == known and task.picture_shape is not None:
            return known
    if task.picture_shape is None:
        raise UsageError(
            f"save_samples is given, but samples of task {task.spec.name} are no images: "
            "leave it out, or give the task an autoencoder"
        )
    raise UsageError(f"save_samples is {form!r}, but it should be one of: npz, png")


def forget_sets(folder: Path) -> None:
    """Removes the pictures in a run's folder, in every form: the run is made anew."""
    for old in folder.glob("samples-*"):
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink()


def save_sets(
    folder: Path,
    task: Task,
    sets: Sequence[int],
    samples: Callable[[int], Tensor],
    form: Form,
    device: torch.device,
) -> None:
    """Writes the pictures and labels of noise sets that are not there yet.

    Args:
        folder: the run's.
        samples: the samples of a noise set, [N, C, H, W].
    """
    missing = [k for k in sets if not _place(folder, k, form).exists()]
    if not missing:
        return
    pixels = Pixels(task, device)
    for k in missing:
        made, labels = samples(k), task.evaluation_labels(k)
        _write(_place(folder, k, form), pixels.batches(made), len(made), labels, form)


def save_pictures(folder: Path, pictures: Pictures, form: Form) -> None:
    """Writes pictures from unknown noise as `save_sets` does, as those of noise set 0."""
    batches = pictures.batches(AT_ONCE)
    _write(_place(folder, 0, form), batches, len(pictures), pictures.labels, form)


def _write(
    place: Path, batches: Iterable[Tensor], n: int, labels: Tensor | None, form: Form
) -> None:
    """Writes a file, or a folder aside that is renamed."""
    if form == "npz":
        write_npz(place, batches, n, labels)
        return
    aside = place.with_name(f".{place.name}.tmp")
    for old in (aside, place):
        shutil.rmtree(old, ignore_errors=True)
    write_pngs(aside, batches, labels)
    aside.replace(place)


def _place(folder: Path, noise_set: int, form: Form) -> Path:
    return folder / (f"samples-{noise_set}" + (".npz" if form == "npz" else ""))
