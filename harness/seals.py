"""What tells damage from a new number: seals of JSON files, and the check sums of zip files.

A sealed file holds the SHA-256 of its own content in canonical form. So spaces and the order of
keys are free.
"""

from __future__ import annotations

import json
import logging
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

from harness.documents import parse_json, read_text
from harness.errors import UsageError
from harness.files import digest, write_text

SEAL = "sha256"
"""The key of the SHA-256 beside the content."""
CHANGED = "it was changed since it was written"
BROKEN_ZIP = (
    *(OSError, ValueError, EOFError, RuntimeError, IndexError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
"""What reading a damaged zip file may raise."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""How NumPy and torch pack files; others, such as LZMA, may ask for gigabytes to be unpacked."""


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """A JSON-like mapping with its seal."""
    return {**content, SEAL: digest(content)}


def unsealed(content: Any, required: bool = False) -> dict[str, Any]:
    """A mapping without its seal, which is compared.

    Args:
        required: whether a mapping without a seal is refused. Older files have none.

    Raises ValueError, in a few words, if it is no mapping or was changed.
    """
    if not isinstance(content, dict):
        raise ValueError("it holds no mapping")
    rest = {name: value for name, value in content.items() if name != SEAL}
    if (SEAL in content or required) and content.get(SEAL) != digest(rest):
        raise ValueError(CHANGED)
    return rest


def write_sealed_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a mapping with its seal aside and renames it."""
    write_text(path, json.dumps(sealed(content), indent=1) + "\n")


def read_sealed_json(path: Path, required: bool = True) -> dict[str, Any]:
    """The mapping in a file of `write_sealed_json`.

    Raises OSError if it cannot be read, and ValueError, in a few words, if it was changed.
    """
    try:
        content = parse_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"it is not JSON in UTF-8: {error}") from error
    return unsealed(content, required)


def check_zip(path: Path) -> None:
    """Compares the check sums of all members of a zip file, such as `.npz` and torch's `.pt`.

    torch and NumPy's mapped arrays do not compare them. A file of another kind passes.

    Raises UsageError if one differs, or if the archive is broken.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type not in METHODS for info in archive.infolist()):
                raise ValueError("it is packed by a method that is not known")
            bad = archive.testzip()
    except BROKEN_ZIP as error:
        raise UsageError(f"{path} is damaged ({error}); fetch or make it again") from error
    if bad is not None:
        raise UsageError(f"{path} is damaged in {bad}; fetch or make it again")


def made_again(path: Path, why: object) -> None:
    """Tells on stderr that a damaged file of a cache is made again."""
    logging.getLogger("harness").warning("%s is made again: %s", path, why)
