"""Image folders: a subfolder for each class, read as torchvision's `ImageFolder` orders them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from harness.data.contents import content_of
from harness.data.readers import PictureReader, open_picture
from harness.errors import UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class Names(Sequence[str]):
    """Many short texts in one block of bytes: a tenth of the memory of a list of paths."""

    def __init__(self, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self._block = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, item: Any) -> str:
        return os.fsdecode(self._block[self._ends[item] : self._ends[item + 1]])


class Folder(PictureReader):
    """The pictures of a folder.

    Args:
        path: the folder. Each subfolder is a class. Without subfolders all are of class 0.
        classes: the subfolders that count, in the order of their labels; none means all, sorted.

    Raises UsageError if a class or all pictures are missing.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], classes: Sequence[str] = ()):
        try:
            found = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
        except OSError as error:
            raise UsageError(f"cannot read the folder {path}: {error.strerror}") from error
        if missing := [name for name in classes if name not in found]:
            raise UsageError(
                f"{path} has no subfolder {missing[0]!r}, which data.classes names; "
                f"it has {', '.join(found[:5]) or 'none'}"
            )
        self.path, self.classes = path, tuple(classes or found)
        names, labels = list[str](), list[int]()
        for label, name in enumerate(self.classes or [""]):
            inside = pictures_below(path, name)
            if not inside:
                raise UsageError(f"{path / name} holds no picture; known are {', '.join(SUFFIXES)}")
            names += inside
            labels += [label] * len(inside)
        self.names = Names(names)
        super().__init__(shape, torch.tensor(labels))

    def name(self, item: int) -> str:
        return str(self.path / self.names[item])

    def read(self, item: int) -> Image.Image:
        with open_picture(self.path / self.names[item]) as picture:
            picture.load()
            return picture

    def content(self) -> str:
        return content_of(self.path, self.names, [list(self.shape), list(self.classes)])


def pictures_below(folder: Path, name: str) -> list[str]:
    """Paths of the pictures in a subfolder and below, relative to the folder, in order."""
    found = []
    for root, _, files in sorted(_walked(folder / name)):
        inside = os.path.relpath(root, folder)
        found += [
            os.path.normpath(f"{inside}/{file}")
            for file in sorted(files)
            if file.lower().endswith(SUFFIXES)
        ]
    return found


def _walked(top: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` through links. Raises UsageError for a link to a folder that holds it."""
    above: dict[str, frozenset[str]] = {}  # the real paths of each folder and of those above it
    for root, folders, files in os.walk(top, followlinks=True):
        holding, real = above.get(os.path.dirname(root), frozenset()), os.path.realpath(root)  # noqa: PTH120
        if real in holding:
            raise UsageError(f"{root} is a link to {real}, which holds it: delete the link")
        above[root] = holding | {real}
        yield root, folders, files
