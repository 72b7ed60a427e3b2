"""Writing aside: a file is made in a folder beside its place, and renamed when it is whole."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from harness.errors import UsageError

LOCK, NEW = "lock", "new"
"""Names in a temporary folder. They have no endings, so no search for files by ending finds one."""


def write_aside(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a path in a temporary folder beside `path`, then renames what is there.

    Readers see the old file or the whole new one. Processes that write one path take turns. The
    next one removes what a killed one left, files of libraries included.

    Raises UsageError if the folder cannot be written.
    """
    try:
        with _alone(path.with_name(f".{path.name}.tmp")) as folder:
            write(folder / NEW)
            (folder / NEW).replace(path)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(
            f"cannot write {path}: {reason}; free some space or name another folder"
        ) from error


@contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """Makes an empty folder that is this process's own in the block, and deletes it afterwards."""
    lock = _locked(folder)
    try:
        for old in folder.iterdir():
            if old.name != LOCK:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _locked(folder: Path) -> IO[str]:
    """Makes a folder and locks a file in it; the kernel frees it when a process ends.

    Whoever had the lock before has deleted it with the folder, so both are made again.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError), ExitStack() as stack:
            stack.callback(_remove_empty, folder)
            lock = stack.enter_context((folder / LOCK).open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(lock.fileno()), (folder / LOCK).stat()):
                stack.pop_all()
                return lock


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
