"""Sets of 8-bit pictures on disk, read and written in batches: ADM's `.npz`, and folders of PNG.

The order of pictures is part of a set, since some metrics take contiguous parts of it.
"""

from __future__ import annotations

import math
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harness.asides import write_aside
from harness.data.arrays import BROKEN, opened, read_array
from harness.data.readers import open_picture
from harness.errors import UsageError
from harness.files import digest, file_hash

CHANNELS = {"L": 1, "RGB": 3}
"""Channels of a PNG by PIL's mode; other modes are refused."""


class Pictures(ABC):
    """A set of pictures that is read in batches.

    Attributes:
        shape: [C, H, W].
        labels: class labels, int64 [n], or None.
    """

    shape: tuple[int, int, int]
    labels: Tensor | None

    def __init__(self, path: Path):
        self.path = path

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def sha256(self) -> str:
        """A digest of the set's content."""

    @abstractmethod
    def batches(self, size: int) -> Iterator[Tensor]:
        """The pictures in order, uint8 [B, C, H, W]. Raises UsageError for a damaged set."""


class NpzPictures(Pictures):
    """`arr_0` of an `.npz` file, uint8 [n, H, W, C], with labels in `arr_1` if they are known.

    The file is read as a stream, so a large one need not fit into memory.

    Raises UsageError if the file is missing, broken or holds something else.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        with _reading(path), _array(path) as (shape, dtype, _):
            self._shape = shape
        if len(shape) != 4 or dtype != np.uint8:
            raise UsageError(
                f"{path}: arr_0 is {dtype} {list(shape)}, but it should be uint8 [n, H, W, C]"
            )
        self.shape = shape[3], shape[1], shape[2]
        with _reading(path):
            labels = read_array(path, "arr_1", 1)
            self.labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))

    def __len__(self) -> int:
        return self._shape[0]

    @cached_property
    def sha256(self) -> str:
        return file_hash(self.path)

    def batches(self, size: int) -> Iterator[Tensor]:
        one = math.prod(self.shape)
        with _reading(self.path), _array(self.path) as (_, _, stream):
            for start in range(0, len(self), size):
                wanted = min(size, len(self) - start) * one
                if len(content := stream.read(wanted)) < wanted:
                    raise EOFError("the array ends early")
                found = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                yield found.view(-1, *self._shape[1:]).permute(0, 3, 1, 2).contiguous()
            stream.read(1)  # at the end of the stream its check sum is compared


class PngPictures(Pictures):
    """PNG files below a folder, in an order that a subclass gives.

    Raises UsageError for pictures of different shapes.
    """

    def __init__(self, path: Path, files: list[Path]):
        super().__init__(path)
        self.files, self.labels = files, None
        self.shape = tuple(_read_png(files[0]).shape)  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def sha256(self) -> str:
        return digest([[str(f.relative_to(self.path)), file_hash(f)] for f in self.files])

    def batches(self, size: int) -> Iterator[Tensor]:
        for start in range(0, len(self), size):
            found = []
            for file in self.files[start : start + size]:
                found.append(_read_png(file))
                if found[-1].shape != self.shape:
                    raise UsageError(
                        f"{file} is {list(found[-1].shape)}, "
                        f"but the first picture of its folder is {list(self.shape)}"
                    )
            yield torch.stack(found)


class FolderPictures(PngPictures):
    """PNG files of a folder: in it without labels, or in one subfolder for each class.

    Subfolders have the numbers of their classes as names. Other names are the classes in sorted
    order, as in torchvision, and then there must be one for each class. Pictures are ordered by
    their names, and those of equal names by class.

    Raises UsageError for a folder without pictures, and for pictures of different shapes.
    """

    def __init__(self, path: Path, num_classes: int):
        flat, deep = sorted(path.glob("*.png")), sorted(path.glob("*/*.png"))
        if (flat and deep) or not (flat or deep):
            what = "both in it and in subfolders" if flat else "no PNG files"
            raise UsageError(
                f"{path} has {what}; give a folder of PNG, or of a subfolder for each class"
            )
        classes = _classes(path, sorted({file.parent.name for file in deep}), num_classes)
        files = [(*_order(file), classes.get(file.parent.name, 0), file) for file in flat + deep]
        super().__init__(path, [file for *_, file in sorted(files)])
        if deep:
            self.labels = torch.tensor([classes[file.parent.name] for file in self.files])


def write_npz(path: Path, batches: Iterable[Tensor], count: int, labels: Tensor | None) -> None:
    """Writes pictures and labels as ADM's evaluator reads them.

    Args:
        batches: uint8 [B, C, H, W], of `count` pictures together.
        labels: [count], if they are known.
    """

    def write(aside: Path) -> None:
        # Members have no time: a zip file knows none before 1980, and equal sets get equal files.
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as stream:
                for number, batch in enumerate(batches):
                    array = batch.permute(0, 2, 3, 1).contiguous().cpu().numpy()
                    if number == 0:
                        _write_header(stream, (count, *array.shape[1:]), "|u1")
                    stream.write(array.tobytes())
            if labels is not None:
                with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as stream:
                    np.lib.format.write_array(stream, labels.cpu().numpy())

    write_aside(path, write)


def write_pngs(folder: Path, batches: Iterable[Tensor], labels: Tensor | None) -> None:
    """Writes pictures as PNG, in a subfolder for each class, named by their numbers.

    Args:
        batches: uint8 [B, 1 or 3, H, W].
        labels: [n], if they are known.
    """
    number = 0
    for batch in batches:
        for picture in batch.cpu():
            place = folder if labels is None else folder / f"{int(labels[number]):04}"
            write_png(place / f"{number:06}.png", picture)
            number += 1


def write_png(path: Path, picture: Tensor) -> None:
    """Writes a picture, uint8 [1 or 3, H, W] on the CPU."""
    array = picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)
    image = Image.fromarray(array.contiguous().numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="png")


def _write_header(stream: IO[bytes], shape: tuple[int, ...], kind: str) -> None:
    header = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)


@contextmanager
def _array(path: Path) -> Iterator[tuple[tuple[int, ...], np.dtype, IO[bytes]]]:
    """The shape, the type and the bytes of `arr_0`."""
    with (
        zipfile.ZipFile(path) as archive,
        opened(archive, "arr_0") as (shape, dtype, fortran, stream),
    ):
        if fortran:
            raise ValueError("the array is not in C order")
        yield shape, dtype, stream


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Inside, errors of an .npz file are sentences."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except BROKEN as error:
        raise UsageError(
            f"{path} is not a file of samples, or it is damaged ({error}); "
            "it should be .npz with arr_0, uint8 [n, H, W, C]"
        ) from error


def _order(file: Path) -> tuple[int, str]:
    """A key that sorts files by number, and others by name after them."""
    return (int(file.stem), "") if file.stem.isdecimal() else (10**18, file.stem)


def _classes(path: Path, names: list[str], num_classes: int) -> dict[str, int]:
    """The classes of subfolders, by name. Raises UsageError for names that say no class."""
    if all(name.isdecimal() for name in names):
        found = {name: int(name) for name in names}
    elif len(names) == num_classes:
        found = {name: number for number, name in enumerate(names)}
    else:
        raise UsageError(
            f"{path} has {len(names)} subfolders for {num_classes} classes: "
            "name each by the number of its class, or give all"
        )
    if too_large := [name for name, number in found.items() if number >= num_classes]:
        raise UsageError(
            f"{path}: subfolder {too_large[0]} is no class; classes are 0 to {num_classes - 1}"
        )
    return found


def _read_png(file: Path) -> Tensor:
    """A picture, uint8 [C, H, W]. Raises UsageError for a broken file, or another mode."""
    try:
        with open_picture(file) as image:
            image.load()
            mode, array = image.mode, np.array(image)
    except Exception as error:  # Pillow's decoders raise anything on broken files
        raise UsageError(f"{file} is no readable picture") from error
    if mode not in CHANNELS:
        raise UsageError(f"{file} is of mode {mode}, but it should be L or RGB")
    return torch.from_numpy(array).view(*array.shape[:2], -1).permute(2, 0, 1)
