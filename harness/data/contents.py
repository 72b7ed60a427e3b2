"""The SHA-256 of many files, computed once and kept in the cache folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from harness.data.cache import intact, locked_folder
from harness.errors import UsageError
from harness.files import cache_folder, digest, file_hash
from harness.seals import read_sealed_json, write_sealed_json


def content_of(
    folder: Path,
    names: Collection[str],
    more: Any = None,
    check: Callable[[], object] | None = None,
) -> str:
    """SHA-256 of files in order: their names and bytes, and a JSON-like value beside them.

    Reading a large set takes minutes, so the answer is kept under the files' sizes and times of
    change. What was changed without changing either is not noticed.

    Args:
        check: is called before the files are read, and raises UsageError for damaged ones.

    Raises UsageError for a file that is gone.
    """
    seen = hashlib.sha256(f"{folder.resolve()}\0{digest(more)}".encode())
    try:
        for name in names:
            found = os.stat(f"{folder}/{name}")  # noqa: PTH116, a million times
            seen.update(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
        kept = cache_folder() / "contents" / seen.hexdigest()[:32] / "content.json"
        with locked_folder(kept.parent):  # of many processes, one reads the files
            if not (kept.is_file() and intact(kept, lambda: read_sealed_json(kept))):
                if check:
                    check()
                whole = hashlib.sha256(digest(more).encode())
                for name in names:
                    whole.update(f"{name}\0{file_hash(folder / name)}\0".encode())
                write_sealed_json(kept, {"content": whole.hexdigest()})
            return read_sealed_json(kept)["content"]
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}") from error
