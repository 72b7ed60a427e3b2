"""Writing aside: a file is made beside its place, and renamed when it is whole."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from harness.errors import UsageError


def write_aside(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary name beside `path`, then renames the file.

    Readers see the old file or the whole new one. Processes that write one path take turns, since
    they share the temporary name. So the next one overwrites what a killed one left.

    Args:
        write: opens the file that it is given, and puts no other in its place.

    Raises UsageError if the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _own(path.with_name(f".{path.name}.tmp")) as aside:
            write(aside)
            aside.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(
            f"cannot write {path}: {reason}; free some space or name another folder"
        ) from error


@contextmanager
def _own(path: Path) -> Iterator[Path]:
    """Makes a file, or takes one that a killed process left. The kernel frees its lock.

    An error inside deletes it.
    """
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, path):  # who had it before has renamed it
                continue
            try:
                yield path
            except BaseException:
                with suppress(OSError):
                    if _is_at(file, path):  # after the rename the name may be another writer's
                        path.unlink()
                raise
            return


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
