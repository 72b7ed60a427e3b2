"""Images that are read by item number when they are asked for: only an index lies in memory."""

from __future__ import annotations

import os
import re
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harness.errors import HarnessError, UsageError
from harness.files import digest, tensors_digest

T = TypeVar("T")
R = TypeVar("R")
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are decoded. Pillow knows more, such as EPS, for which it starts Ghostscript."""
MODES = {1: "L", 3: "RGB"}
"""Pillow's mode by the number of channels."""


class Images(Protocol):
    """Images of a set: a tensor [n, C, H, W], or what reads as one by item number."""

    @property
    def shape(self) -> Any:
        """n, C, H and W."""

    def __len__(self) -> int: ...

    def __getitem__(self, items: Any) -> Tensor:
        """Images of items [B] or of a slice, [B, C, H, W], float32 in [-1, 1]."""

    def split(self, split_size: Any) -> Iterable[Tensor]:
        """The images in order, `split_size` at once."""


class Reader(ABC):
    """Images by item number, float32; a subclass reads them from files.

    Attributes:
        labels: [n], int64.
        shape: n, C, H and W.
        classes: names in the order of labels, if they are known.
    """

    labels: Tensor
    shape: tuple[int, int, int, int]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, items: Tensor | slice) -> Tensor:
        """Images of items [B] or of a slice, [B, C, H, W]."""
        return self.views(torch.arange(len(self))[items], False)

    def split(self, split_size: int) -> Iterator[Tensor]:
        """The images in order, `split_size` at once."""
        for start in range(0, len(self), split_size):
            yield self[start : start + split_size]

    @abstractmethod
    def views(self, items: Tensor, mirrored: Tensor | bool) -> Tensor:
        """Images of items [B]; those where the mask [B] is true are mirrored."""

    @abstractmethod
    def content(self) -> str:
        """SHA-256 of everything that decides the images and labels."""


class PictureReader(Reader):
    """PictureReader, cropped to a square as ADM does, in [-1, 1].

    Args:
        shape: C, H and W of an image.
        labels: [n], int64.

    Raises UsageError for a shape that pictures cannot have.
    """

    def __init__(self, shape: tuple[int, int, int], labels: Tensor):
        channels, height, width = shape
        if channels not in MODES or height != width:
            raise UsageError(
                f"data.shape is {list(shape)}, but pictures are cropped to squares "
                "with 1 or 3 channels"
            )
        self.labels, self.shape = labels, (len(labels), *shape)

    @abstractmethod
    def read(self, item: int) -> Image.Image:
        """The picture of an item, as it is stored."""

    @abstractmethod
    def name(self, item: int) -> str:
        """Where the picture of an item lies, for errors."""

    def pixels(self, item: int) -> np.ndarray:
        """The cropped picture of an item, uint8 [C, H, W].

        Raises UsageError if it cannot be read.
        """
        try:
            picture = self.read(item).convert(MODES[self.shape[1]])
            return np.atleast_3d(centre_crop(picture, self.shape[2])).transpose(2, 0, 1)
        except HarnessError:
            raise
        except Exception as error:  # Pillow's decoders raise anything on broken files
            why = re.sub(r" ?<_io.*?>", "", " ".join(str(error).split())) or type(error).__name__
            raise UsageError(
                f"{self.name(item)} is no readable image ({why}); replace or remove it"
            ) from error

    def views(self, items: Tensor, mirrored: Tensor | bool) -> Tensor:
        found = list(threads().map(self.pixels, items.tolist()))
        whole = np.stack(found) if found else np.empty((0, *self.shape[1:]), np.uint8)
        images = torch.from_numpy(whole).float() / 127.5 - 1
        return mirror(images, mirrored)


class Part(Reader):
    """Some items of a reader, in a given order; `items` [m] are their numbers."""

    def __init__(self, whole: Reader, items: Tensor):
        self.whole, self.items, self.classes = whole, items, whole.classes
        self.labels, self.shape = whole.labels[items], (len(items), *whole.shape[1:])

    def views(self, items: Tensor, mirrored: Tensor | bool) -> Tensor:
        return self.whole.views(self.items[items], mirrored)

    def content(self) -> str:
        return digest([self.whole.content(), tensors_digest({"items": self.items})])


def open_picture(file: Any) -> Image.Image:
    """A picture in one of `FORMATS`, whatever its name ends in; its pixels are read later.

    Raises what Pillow raises, also for pictures of more than 179 million pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # half as many are fine
        return Image.open(file, formats=FORMATS)


def mirror(images: Tensor, where: Tensor | bool) -> Tensor:
    """Images [B, C, H, W] with those mirrored left to right where the mask [B] is true."""
    if isinstance(where, bool):
        return images.flip(3) if where else images
    return torch.where(where.reshape(-1, 1, 1, 1), images.flip(3), images)


def centre_crop(picture: Image.Image, size: int) -> np.ndarray:
    """A square of `size` pixels from the middle of a picture, uint8 [size, size, C].

    It is the crop of ADM (Dhariwal & Nichol 2021, arXiv 2105.05233, `center_crop_arr`): box halving
    while the shorter side is at least twice the size, then bicubic resizing, then the middle.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    if (pixels := scale**2 * picture.width * picture.height) > (most := 2**28):
        raise ValueError(
            f"it is so narrow that {pixels:.2g} pixels would be made of it, over {most}"
        )
    resized = np.array(
        picture.resize(
            (round(picture.width * scale), round(picture.height * scale)),
            Image.Resampling.BICUBIC,
        )
    )
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top : top + size, left : left + size]


def read_ahead(read: Callable[[T], R], of: Iterable[T]) -> Iterator[R]:
    """What `read` gives for each value; a thread reads the next while this one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="read") as thread:
        coming: deque[Future[R]] = deque()
        for value in of:
            coming.append(thread.submit(read, value))
            if len(coming) > 1:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


@cache
def threads() -> ThreadPoolExecutor:
    """The threads that decode pictures; Pillow decodes and resizes without Python's lock."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decode")
