"""The image set that a task's `data` names: a set without a path, or files of one of four kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.data import images
from harness.data.arrays import Archive
from harness.data.folders import Folder
from harness.data.images import ImageSet, Split
from harness.data.latents import Latents
from harness.data.readers import Part, Reader
from harness.data.tars import Tars
from harness.diffusion.randomness import Keyed
from harness.errors import UsageError, unknown
from harness.files import data_folder

SHARE = 0.2
"""The held-out share of each class where nothing else is said."""
HELD_OUT = ("held_out", "val", "validation", "test")
"""Folders beside `train` that hold the held-out part."""


@dataclass(frozen=True)
class Wanted:
    """What a task says about its image set.

    Attributes:
        name: a name in `IMAGE_SETS` or `FILE_SETS`.
        shape: C, H and W.
        num_classes: labels are 0 .. num_classes - 1; None means any.
        seed: draws the held-out part where the set has none of its own.
        path: the files; absolute, or relative to `folder` or to the folder of data sets.
        folder: the folder of the task's YAML file.
        held_out: a share of each class, or a path like `path`; None means the set's own part, a
            folder beside `train`, or 20 %.
        classes: names of classes in the order of their labels; empty means all, sorted.
        flip: whether training mirrors half of the images.
        autoencoder: what is known of the autoencoder of latents; see `Latents`.
    """

    name: str
    shape: tuple[int, int, int]
    num_classes: int | None
    seed: int = 0
    path: str | None = None
    folder: Path | None = None
    held_out: float | str | None = None
    classes: tuple[str, ...] = ()
    flip: bool = False
    autoencoder: Mapping[str, Any] | None = None

    def where(self, text: str) -> Path:
        """The file or folder that a path means. Raises UsageError if there is none."""
        tried = [folder / text for folder in (self.folder or Path(), data_folder())]
        for path in tried:
            if path.exists():
                return path
        places = dict.fromkeys(str(path) for path in tried)
        raise UsageError(
            f"there is no {' and no '.join(places)}; data.path is absolute, or relative to the "
            "task's file or to --data-dir"
        )


def _folder(path: Path, wanted: Wanted) -> Reader:
    found = Folder(path, wanted.shape, wanted.classes)
    if (count := max(1, len(found.classes))) != (wanted.num_classes or count):
        raise UsageError(
            f"{path} has {count} classes, but data.num_classes is {wanted.num_classes}: "
            "change it, or list the wanted subfolders in data.classes"
        )
    return found


FILE_SETS: dict[str, Callable[[Path, Wanted], Reader]] = {
    "folder": _folder,
    "webdataset": lambda path, w: Tars(path, w.shape, w.classes, w.num_classes != 1),
    "npz": lambda path, w: Archive(path, w.shape, w.num_classes != 1),
    "latents": lambda path, w: Latents(path, w.shape, w.flip, w.autoencoder),
}
"""Sets that are files, by kind."""


def load_split(wanted: Wanted) -> Split:
    """The image set of a task.

    Raises:
        UsageError: for an unknown name, files that are missing or broken, or images and labels that
            differ from what the task says.
    """
    if wanted.name in FILE_SETS:
        split = _of_files(wanted)
    elif wanted.name in images.IMAGE_SETS:
        split = images.IMAGE_SETS[wanted.name](wanted.seed)
    else:
        raise unknown("image set", wanted.name, {*images.IMAGE_SETS, *FILE_SETS})
    found = tuple(split.train.images.shape[1:])
    if found != tuple(wanted.shape):
        raise UsageError(
            f"images of set {wanted.name} have the shape {list(found)}, "
            f"but data.shape is {list(wanted.shape)}"
        )
    return replace(split, train=replace(split.train, flip=wanted.flip))


def _of_files(wanted: Wanted) -> Split:
    """The two parts of a set that is files."""
    if wanted.path is None:
        raise UsageError(f"set {wanted.name} needs data.path, the place of its files")
    path, opened = wanted.where(wanted.path), FILE_SETS[wanted.name]
    beside = [name for name in HELD_OUT if (path / "train").is_dir() and (path / name).is_dir()]
    whole = path / "train" if beside else path
    if beside and wanted.held_out is None:
        train, held_out = opened(whole, wanted), path / beside[0]
    elif isinstance(wanted.held_out, str):
        train, held_out = opened(whole, wanted), wanted.where(wanted.held_out)
    else:
        share = SHARE if wanted.held_out is None else wanted.held_out
        if not 0 < share < 1:
            raise UsageError(f"data.held_out is {share}, but a share lies between 0 and 1")
        both = opened(whole, wanted)
        kept, out = drawn(both.labels, share, wanted.seed)
        return Split(_checked(Part(both, kept), wanted), _checked(Part(both, out), wanted))
    if isinstance(train, Folder):
        wanted = replace(wanted, classes=train.classes)
    return Split(
        _checked(train, wanted), _checked(opened(held_out, replace(wanted, flip=False)), wanted)
    )


def _checked(found: Reader, wanted: Wanted) -> ImageSet:
    """An image set, once its labels are found to be classes of the task."""
    if not len(found):
        raise UsageError(f"a part of set {wanted.name} in {wanted.path} is empty")
    if wanted.num_classes is None:
        return ImageSet(found, found.labels)
    low, high = int(found.labels.min()), int(found.labels.max())
    if low < 0 or high >= wanted.num_classes:
        raise UsageError(
            f"set {wanted.name} in {wanted.path} has labels {low} to {high}, "
            f"but data.num_classes {wanted.num_classes} allows 0 to {wanted.num_classes - 1}"
        )
    return ImageSet(found, found.labels)


def drawn(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Items of the training and of the held-out part, each in order.

    Each class gives `share` of its items, at least one if it has two.
    """
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    keys = Keyed("split", seed)
    for label in labels.unique().tolist():
        items = (labels == label).nonzero().squeeze(1)
        count = min(max(1, round(share * len(items))), len(items) - 1)
        held_out[items[keys.permutation(f"class {label}", len(items))[:count]]] = True
    return (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)
