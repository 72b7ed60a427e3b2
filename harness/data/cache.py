"""Tensors that a key determines, computed once and kept in the cache folder.

A file is written aside and renamed under its folder's lock, so two processes compute it once. The
ranks of one run compute it together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from harness import ranks
from harness.errors import UsageError
from harness.files import LARGE, cache_folder, digest, map_tensors, write_mapped


@contextmanager
def locked_folder(folder: Path, remedy: str = "set HARNESS_CACHE to another") -> Iterator[None]:
    """Creates a folder and holds its lock; of several ranks the first one does.

    Args:
        remedy: what to do if the folder cannot be written; it stands in the error.

    Raises UsageError if the folder cannot be written.
    """
    lock = FileLock(folder / "lock")

    def acquire() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise UsageError(
                f"cannot write the folder {folder}: {error.strerror}; {remedy}"
            ) from error

    ranks.told_by_first(acquire)
    try:
        yield
    finally:
        lock.release()


def samples_folder(key: dict[str, Any]) -> Path:
    """The folder that holds the tensors of a JSON-like key once they are computed."""
    return cache_folder() / "samples" / digest(key)[:32]


def cached_tensors(
    key: dict[str, Any], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Named tensors that a JSON-like key determines, from the cache or computed and kept there.

    Raises:
        UsageError: if the cached file was damaged or the cache folder cannot be written.
    """
    folder = samples_folder(key)
    path = folder / "samples.safetensors"
    if not ranks.told_by_first(path.exists):
        with locked_folder(folder):
            if not ranks.told_by_first(path.exists):
                found = compute()
                ranks.told_by_first(lambda: write_mapped(path, found))
    # A large tensor stays in its file.
    found = map_tensors(path)
    return {name: x if x.nbytes >= LARGE else x.clone() for name, x in found.items()}


def cached_samples(key: dict[str, Any], compute: Callable[[], Tensor]) -> Tensor:
    """Like `cached_tensors`, for one tensor of samples [n, C, H, W]."""
    return cached_tensors(key, lambda: {"samples": compute()})["samples"]
