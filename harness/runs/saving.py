"""Samples of a run as files for other evaluators: ADM's `.npz`, PNG by class, or GenEval's."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from harness.data.geneval import PromptFolders, write_folders
from harness.data.pictures import Pictures, write_npz, write_pngs
from harness.errors import UsageError
from harness.metrics.pixels import AT_ONCE, Pixels
from harness.tasks import Task

Form = Literal["npz", "png", "geneval"]
"""For noise set K `samples-K.npz`, a folder `samples-K` with PNG by class, or a folder
`samples-K-geneval` with PNG by prompt."""
ENDINGS = {"npz": ".npz", "png": "", "geneval": "-geneval"}
Prompted = tuple[Tensor, Sequence[dict[str, Any]]]
"""The prompt of each picture by number, [n], and what GenEval's files say of all prompts."""


def check_form(form: str | None, task: Task) -> Form | None:
    """The form of files. Raises UsageError for an unknown one, and where it does not suit samples.

    Args:
        form: a word; None saves nothing.
    """
    if form is None:
        return None
    if form == "geneval" and task.judged_prompts is None:
        raise UsageError(
            f"save_samples is geneval, but task {task.spec.name} has no prompts in words: "
            "give npz or png"
        )
    for known in get_args(Form):
        if form == known and task.picture_shape is not None:
            return known
    if task.picture_shape is None:
        raise UsageError(
            f"save_samples is given, but samples of task {task.spec.name} are no images: "
            "leave it out, or give the task an autoencoder"
        )
    raise UsageError(f"save_samples is {form!r}, but it should be one of: npz, png, geneval")


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
        made, labels, prompted = samples(k), task.evaluation_labels(k), None
        if task.judged_prompts:
            prompted = task.evaluation_numbers(k), task.judged_prompts
        _write(_place(folder, k, form), pixels.batches(made), len(made), labels, prompted)


def save_pictures(folder: Path, pictures: Pictures, form: Form) -> None:
    """Writes pictures from unknown noise as `save_sets` does, as those of noise set 0."""
    batches, prompted = pictures.batches(AT_ONCE), None
    if isinstance(pictures, PromptFolders):
        prompted = pictures.numbers, pictures.metadata
    _write(_place(folder, 0, form), batches, len(pictures), pictures.labels, prompted)


def check_pictures(pictures: Pictures, form: Form | None) -> None:
    """Raises UsageError if pictures from elsewhere lack the prompts that a form needs."""
    if form == "geneval" and not isinstance(pictures, PromptFolders):
        raise UsageError(
            f"save_samples is geneval, but the prompts of {pictures.path} are unknown: "
            "give npz or png"
        )


def _write(
    place: Path,
    batches: Iterable[Tensor],
    n: int,
    labels: Tensor | None,
    prompted: Prompted | None,
) -> None:
    """Writes a file, or a folder aside that is renamed; the ending of its name says the form."""
    if place.name.endswith(ENDINGS["npz"]):
        write_npz(place, batches, n, labels)
        return
    aside = place.with_name(f".{place.name}.tmp")
    for old in (aside, place):
        shutil.rmtree(old, ignore_errors=True)
    try:
        if place.name.endswith(ENDINGS["geneval"]) and prompted:
            write_folders(aside, batches, *prompted)
        else:
            write_pngs(aside, batches, labels)
        aside.replace(place)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UsageError(
            f"cannot write {place}: {error.strerror}; free some space or name another folder"
        ) from error


def _place(folder: Path, noise_set: int, form: Form) -> Path:
    return folder / f"samples-{noise_set}{ENDINGS[form]}"
