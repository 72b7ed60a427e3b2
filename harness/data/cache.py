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
from harness.files import LARGE, cache_folder, digest, map_tensors, write_sealed
from harness.seals import made_again


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


def intact(path: Path, check: Callable[[], object]) -> bool:
    """Whether a check of a cached file raises nothing; if it does, stderr says so."""
    try:
        check()
    except (UsageError, OSError, ValueError) as error:
        made_again(path, error)
        return False
    return True


def samples_folder(key: dict[str, Any]) -> Path:
    """The folder that holds the tensors of a JSON-like key once they are computed."""
    return cache_folder() / "samples" / digest(key)[:32]


def cached_tensors(
    key: dict[str, Any], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Named tensors that a JSON-like key determines, from the cache or computed and kept there.

    A file that was damaged is computed again.

    Raises UsageError if the cache folder cannot be written.
    """
    folder = samples_folder(key)
    path, of = folder / "samples.safetensors", folder.name

    def there() -> bool:
        return path.exists() and intact(path, lambda: map_tensors(path, of=of))

    if not ranks.told_by_first(there):
        with locked_folder(folder):
            if not ranks.told_by_first(there):
                found = compute()
                ranks.told_by_first(lambda: write_sealed(path, found, of=of))
    # A large tensor stays in its file.
    found = map_tensors(path, checked=False)
    return {name: x if x.nbytes >= LARGE else x.clone() for name, x in found.items()}


def cached_samples(key: dict[str, Any], compute: Callable[[], Tensor]) -> Tensor:
    """Like `cached_tensors`, for one tensor of samples [n, C, H, W]."""
    return cached_tensors(key, lambda: {"samples": compute()})["samples"]
