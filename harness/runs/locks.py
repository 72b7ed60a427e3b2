"""File locks of a results folder: one process makes a run, trains a student or leads a study.

The kernel frees a lock when its process ends, however it ends. Several machines need a shared
folder whose file system supports `flock`, as NFS on Linux does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from harness.errors import Busy, UsageError

GLIMPSE = 1.0
"""Seconds after which a lock counts as held: `is_held` may take it for an instant."""


def _path(results: Path, name: str) -> Path:
    return results / "runs" / ".locks" / name


@contextmanager
def held(results: Path, *names: str, wait: bool = False) -> Iterator[None]:
    """Holds the locks of these names inside the block.

    Args:
        wait: whether to wait for another process that holds one.

    Raises:
        Busy: if another process holds one, unless `wait`.
        UsageError: if the results folder cannot be written.
    """
    with ExitStack() as stack:
        for name in names:
            path = _path(results, name)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(path, timeout=-1 if wait else GLIMPSE))
            except Timeout as error:
                raise Busy(f"another process works on {name}; ask again when it is done") from error
            except OSError as error:
                raise UsageError(
                    f"cannot write {path.parent}: {error.strerror}; give another --results"
                ) from error
        yield


def is_held(results: Path, name: str) -> bool:
    """Whether a process holds the lock of this name. Nothing is written."""
    path = _path(results, name)
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def held_names(results: Path) -> list[str]:
    """The names whose locks are held now, in alphabetical order."""
    return sorted(path.name for path in _path(results, "").glob("*") if is_held(results, path.name))
