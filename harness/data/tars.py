"""WebDataset shards: tar files whose members of one name are a picture and its class.

A member's offset is found once and kept in the cache folder, so pictures are read in any order.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from harness.data.cache import intact
from harness.data.contents import content_of
from harness.data.readers import PictureReader, open_picture
from harness.errors import UsageError
from harness.files import cache_folder, digest, map_tensors, write_sealed

SUFFIXES = ("jpg", "jpeg", "png", "webp")
MOST_LABEL = 4096
"""Bytes of a `.cls` member, which states a number or the name of a class."""
MOST_DIGITS = 18
"""Digits of a label, which is kept in 64 bits."""
BLOCK = 512
"""Bytes of a tar header, which lies before the data of its member."""


class Tars(PictureReader):
    """The pictures of tar files, sorted by name, each in its order.

    Args:
        path: a folder of `*.tar` files, or one file.
        classes: names that may stand in `.cls` members instead of numbers, in the order of labels.
        labelled: whether members without `.cls` are refused; if not, they are of class 0.

    Raises UsageError if there is no shard, or one that is broken or holds no pictures.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int],
        classes: Sequence[str] = (),
        labelled: bool = True,
    ):
        self.path, self.classes = path if path.is_dir() else path.parent, tuple(classes)
        self.files = sorted(self.path.glob("*.tar")) if path.is_dir() else [path]
        if not self.files:
            raise UsageError(f"{path} holds no shard; a WebDataset is files *.tar")
        parts = [index_of(file, self.classes, labelled) for file in self.files]
        self.owner = np.repeat(np.arange(len(parts), dtype=np.int32), [len(p) for p in parts])
        self.index = np.concatenate(parts)  # offset, size and label of each picture
        super().__init__(shape, torch.from_numpy(self.index[:, 2].copy()))

    def _bytes(self, item: int, offset: int, size: int) -> bytes:
        with self.files[self.owner[item]].open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def name(self, item: int) -> str:
        header = self._bytes(item, int(self.index[item, 0]) - BLOCK, BLOCK)
        member = tarfile.TarInfo.frombuf(header, "utf-8", "replace").name
        return f"{member} in {self.files[self.owner[item]]}"

    def read(self, item: int) -> Image.Image:
        offset, size, _ = self.index[item].tolist()
        return open_picture(io.BytesIO(self._bytes(item, offset, size)))

    def content(self) -> str:
        names = [file.name for file in self.files]
        return content_of(self.path, names, [list(self.shape), list(self.classes)])


def index_of(file: Path, classes: Sequence[str], labelled: bool) -> np.ndarray:
    """Offset, size and label of each picture in a shard, int64 [n, 3].

    It is kept in the cache folder under the file's name, size and time of change.

    Raises UsageError if the shard is broken, or if a picture has no class.
    """
    try:
        found = file.stat()
    except OSError as error:
        raise UsageError(f"there is no file {file}") from error
    key = [str(file.resolve()), found.st_size, found.st_mtime_ns, list(classes), labelled]
    kept = cache_folder() / "indexes" / f"{digest(key)[:32]}.safetensors"
    if not (kept.is_file() and intact(kept, lambda: map_tensors(kept))):
        index = np.array(list(_listed(file, classes, labelled)), np.int64).reshape(-1, 3)
        if not len(index):
            raise UsageError(f"{file} holds no picture; known are {', '.join(SUFFIXES)}")
        write_sealed(kept, {"index": torch.from_numpy(index)})
    return map_tensors(kept, checked=False)["index"].numpy()


def _listed(file: Path, classes: Sequence[str], labelled: bool) -> list[tuple[int, int, int]]:
    pictures, labels = dict[str, tuple[int, int]](), dict[str, int]()
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if member.size < 0 or member.issparse():
                    raise ValueError(f"{member.name} has no bytes of its own")
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key = f"{folder}/{stem}"
                if member.isfile() and suffix.lower() in SUFFIXES:
                    pictures[key] = (member.offset_data, member.size)
                elif member.isfile() and suffix.lower() == "cls":
                    content = tar.extractfile(member)
                    assert content is not None
                    text = content.read(MOST_LABEL).decode().strip()
                    labels[key] = _label(text, classes, member, file)
            _check_end(file, tar.offset)
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        raise UsageError(f"{file} is no readable tar file ({error}); fetch it again") from error
    size, end = file.stat().st_size, max((sum(place) for place in pictures.values()), default=0)
    if end > size:
        raise UsageError(f"{file} is cut off after {size} bytes; fetch it again")
    if labelled and (missing := pictures.keys() - labels.keys()):
        raise UsageError(
            f"{min(missing).strip('/')} in {file} has a picture, but no .cls beside it: "
            "add it, or fetch the file again"
        )
    return [(*place, labels.get(key, 0)) for key, place in pictures.items()]


def _check_end(file: Path, offset: int) -> None:
    """Raises UsageError unless zeros alone follow the last member: tarfile stops at any damage."""
    with file.open("rb") as rest:
        rest.seek(offset)
        while part := rest.read(2**20):
            if part.strip(b"\0"):
                raise UsageError(f"{file} is damaged after byte {offset}; fetch it again")


def _label(text: str, classes: Sequence[str], member: tarfile.TarInfo, file: Path) -> int:
    """The label that a `.cls` member states by name or number."""
    if text in classes:
        return classes.index(text)
    if text.isdecimal() and len(text) < MOST_DIGITS:
        return int(text)
    what = "a number or one of data.classes" if classes else "a number"
    raise UsageError(f"{member.name} in {file} says {text[:40]!r}, but should say {what}")
