"""Images in arrays: `.npz` files as ADM writes them, mapped and not read."""

from __future__ import annotations

import math
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tokenize import TokenError
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harness.asides import write_aside
from harness.data.cache import intact
from harness.data.contents import content_of
from harness.data.readers import PictureReader
from harness.data.shards import check_disk, remember, unchanged
from harness.errors import UsageError
from harness.files import cache_folder, digest, tensors_digest
from harness.seals import BROKEN_ZIP, CHANGED, METHODS, check_zip

BROKEN = (*BROKEN_ZIP, KeyError, TypeError, MemoryError)
"""What reading a damaged .npz file may raise; TypeError comes from a bare array."""
LARGE, MOST_PACKED = 2**26, 100
"""An array of more than so many bytes is packed at most so many times: pictures are some 2 times,
while zeros are 1,000 times."""


class Arrays(PictureReader):
    """PictureReader in an array.

    Args:
        images: uint8 [n, H, W, C], in memory or mapped.
        labels: [n], int64.
    """

    def __init__(self, images: np.ndarray, labels: Tensor, shape: tuple[int, int, int]):
        self.images = images
        super().__init__(shape, labels)

    def name(self, item: int) -> str:
        return f"image {item}"

    def read(self, item: int) -> Image.Image:
        return Image.fromarray(
            np.squeeze(self.images[item], 2) if self.images.shape[3] == 1 else self.images[item]
        )

    def content(self) -> str:
        parts = {"images": torch.from_numpy(np.asarray(self.images)), "labels": self.labels}
        return tensors_digest(parts)


class Archive(Arrays):
    """The pictures of an `.npz` file: `arr_0` uint8 [n, H, W, C], `arr_1` labels [n].

    Args:
        labelled: whether a file without `arr_1` is refused; if not, all are of class 0.

    Raises UsageError if the file is broken or holds something else.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], labelled: bool = True):
        self.path, images = path, mapped(path, "arr_0")
        if images is None or images.dtype != np.uint8 or images.ndim != 4:
            found = "nothing" if images is None else f"{images.dtype} {list(images.shape)}"
            raise UsageError(f"{path} holds {found} as arr_0, but uint8 [n, H, W, C] is needed")
        if images.shape[3] not in (1, 3):
            raise UsageError(
                f"{path} holds images of {images.shape[3]} channels as arr_0, but 1 or 3 are needed"
            )
        labels = mapped(path, "arr_1")
        if labels is None and labelled:
            raise UsageError(f"{path} holds no labels as arr_1; one class needs none")
        labels = np.zeros(len(images), np.int64) if labels is None else labels
        if len(labels) != len(images) or labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise UsageError(
                f"{path} holds {labels.dtype} {list(labels.shape)} as arr_1, "
                f"but {len(images)} whole numbers are needed"
            )
        super().__init__(images, torch.from_numpy(labels.astype(np.int64)), shape)

    def name(self, item: int) -> str:
        return f"image {item} of {self.path}"

    def content(self) -> str:
        check = partial(check_zip, self.path)
        return content_of(self.path.parent, [self.path.name], list(self.shape), check)


def mapped(path: Path, name: str) -> np.ndarray | None:
    """An array of an `.npz` file, mapped into memory; None if the file has none of that name.

    A compressed array is unpacked once, into the cache folder.

    Raises UsageError if the file is missing or broken.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                return None
            with opened(archive, name):  # whether its header is true
                info = archive.getinfo(f"{name}.npy")
            if info.compress_type == zipfile.ZIP_STORED:
                return _map(path, _start(path, info))
            found = path.stat()
            key = [str(path.resolve()), found.st_size, found.st_mtime_ns, name]
            kept = cache_folder() / "unpacked" / f"{digest(key)[:32]}.npy"
            if not unchanged(kept):
                if not (kept.is_file() and intact(kept, partial(_compare, kept, info))):
                    what = f"{name} of {path}, unpacked,"
                    remedy = "set HARNESS_CACHE to a larger disk"
                    check_disk(what, float(info.file_size), cache_folder(), remedy)
                    write_aside(kept, lambda aside: _unpack(archive, info, aside))
                remember(kept.parent, [kept.name])
            return _map(kept, 0)
    except BROKEN as error:
        raise UsageError(f"{path} is no readable npz file ({error}); fetch it again") from error


@contextmanager
def opened(
    archive: zipfile.ZipFile, name: str
) -> Iterator[tuple[tuple[int, ...], np.dtype, bool, IO[bytes]]]:
    """The shape, the type and the bytes of an array in an `.npz` file, and if in Fortran's order.

    Raises ValueError for a bomb, and for a header that states other bytes than follow.
    """
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type not in METHODS:
        raise ValueError(f"{name} is packed by a method that NumPy does not use")
    assert archive.fp is not None
    packed = min(info.compress_size, archive.fp.seek(0, 2))
    if info.file_size > max(LARGE, MOST_PACKED * packed):
        raise ValueError(
            f"{name} would be unpacked to {info.file_size / 1e9:.3g} GB, "
            f"over {MOST_PACKED} times its size here: store it without compression"
        )
    with archive.open(info) as stream:
        shape, fortran, dtype = npy_header(stream)
        if math.prod(shape) * dtype.itemsize != info.file_size - stream.tell():
            raise ValueError(f"{name} states the shape {list(shape)}, but has other bytes")
        yield shape, dtype, fortran, stream


def read_array(path: Path, name: str, ndim: int) -> np.ndarray | None:
    """A small array of an `.npz` file, in memory; None if the file has none of that name.

    Raises ValueError and others of `BROKEN`, also for another number of dimensions.
    """
    with zipfile.ZipFile(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            return None
        with opened(archive, name) as (shape, dtype, fortran, stream):
            if len(shape) != ndim or dtype.kind not in "iuf":
                raise ValueError(f"{name} is {dtype} {list(shape)}")
            found = np.frombuffer(stream.read(), dtype)
            return found.reshape(shape, order="F" if fortran else "C").copy()


def _start(path: Path, info: zipfile.ZipInfo) -> int:
    """The place of a member's bytes: after its header, its name and its extra field."""
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        return info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))


def _unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo, to: Path) -> None:
    with archive.open(info) as source, to.open("wb") as target:
        shutil.copyfileobj(source, target)


def _compare(unpacked: Path, info: zipfile.ZipInfo) -> None:
    """Raises ValueError if an unpacked file has another check sum than its member's."""
    found = 0
    with unpacked.open("rb") as file:
        while part := file.read(2**20):
            found = zlib.crc32(part, found)
    if found != info.CRC:
        raise ValueError(CHANGED)


def _map(path: Path, start: int) -> np.ndarray:
    """The array of the `.npy` content that starts at a byte of a file."""
    with path.open("rb") as file:
        file.seek(start)
        shape, fortran, dtype = npy_header(file)
        where = file.tell()
    return np.memmap(path, dtype, "r", where, shape, "F" if fortran else "C")


def npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and type of `.npy` content, which then follows.

    Raises ValueError for objects, for a version that is not known, and for a damaged header.
    """
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(stream)
    if version not in readers:
        raise ValueError(f"version {version} of npy is not known")
    try:
        shape, fortran, dtype = readers[version](stream)
    except (ValueError, SyntaxError, TokenError) as error:  # NumPy parses a header as Python
        raise ValueError("its header is damaged") from error
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if min(shape, default=0) < 0:
        raise ValueError(f"it states the shape {list(shape)}")
    return shape, fortran, dtype
