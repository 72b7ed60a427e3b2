"""Files: written whole or not at all, hashed, read with one-sentence errors."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from harness.asides import write_aside
from harness.errors import UsageError

DIGEST = "digest"
"""The key of a digest in the metadata of a safetensors file."""
LARGE = 2**28
"""Bytes from which a set of samples lies in a file instead of memory."""
DTYPES = {dtype: name for name, dtype in safetensors.torch._TYPES.items()}
"""Names of types in a safetensors file."""
BITS = {torch.bfloat16: torch.int16} | {
    dtype: torch.uint8 for dtype, name in DTYPES.items() if name.startswith("F8")
}
"""Types that NumPy lacks, and integers of their size."""
LONGEST_NAME = 120
"""Bytes of a name that becomes a part of a path, which has 255 at most."""


def check_name(name: str, what: str) -> str:
    """The name of a run, a task or a piece of work, which becomes a part of a path.

    Raises UsageError for one that is a path, begins with no letter or digit, or does not print.
    """
    if not (
        name[:1].isalnum()
        and name.isprintable()
        and not {"/", "\\"} & {*name}
        and len(name.encode()) <= LONGEST_NAME
    ):
        raise UsageError(
            f"{what} is {name!r}, but should be a name: it begins with a letter or digit, has no "
            f"/ or \\, prints, and has at most {LONGEST_NAME} bytes"
        )
    return name


def inside(path: Path, folder: Path) -> Path:
    """A path in a folder. Raises UsageError where links lead out of the folder."""
    below = [path, *path.parents][: len(path.parts) - len(folder.parts)]
    if any(map(os.path.islink, below)) and not path.resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            f"{path} is a link that leads out of {folder}, to {path.resolve()}: "
            "copy what is there, or name the folder itself"
        )
    return path


def write_text(path: Path, text: str) -> None:
    """Writes a text file aside and renames it."""
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file aside and renames it. Equal contents have equal bytes.

    The library's own writer makes a further file, which a killed process would leave.

    Raises UsageError for a type that the format lacks.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise UsageError(f"{path}: safetensors holds no {tensor.dtype}, which {name} has")
    sizes = {name: tensor.element_size() for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (-sizes[name], name))  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in order:
        start, end = end, end + sizes[name] * tensors[name].numel()
        header[name] = {
            "dtype": DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(aside: Path) -> None:
        with aside.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                whole = tensors[name].detach().cpu().contiguous()
                file.write(whole.reshape(-1).view(torch.uint8).numpy().data)

    write_aside(path, write)


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name.

    Raises UsageError if the file is missing or broken, has another SHA-256 than the given one, or
    is a file of `write_sealed` that was changed.
    """
    check_hash(path, sha256)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UsageError(
            f"{path} is not a readable safetensors file: {error}; fetch it or make it again"
        ) from error
    metadata, _ = header_of(path)
    if DIGEST in metadata and not _is_sealed(tensors, metadata):
        raise UsageError(f"{path} was changed since it was written; fetch it or make it again")
    return tensors


def write_sealed(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, of: str = ""
) -> None:
    """Writes a safetensors file with the digest of its tensors and metadata.

    Args:
        of: what the file holds, which `map_tensors` compares. It stands behind the digest.
    """
    metadata = metadata or {}
    stated = _sealed_digest(tensors, metadata) + (f" of {of}" if of else "")
    write_tensors(path, tensors, {**metadata, DIGEST: stated})


def _sealed_digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    others = {name: text for name, text in metadata.items() if name != DIGEST}
    found = tensors_digest(tensors)
    return digest([found, others]) if others else found


def _is_sealed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bool:
    return metadata.get(DIGEST, "").partition(" of ")[0] == _sealed_digest(tensors, metadata)


def map_tensors(path: Path, checked: bool = True, of: str = "") -> dict[str, Tensor]:
    """Memory-maps a file that `write_sealed` wrote.

    Args:
        checked: whether the whole file is read, to compare its digest.
        of: what the file should hold, if it says that; "" takes anything.

    Raises UsageError if the file is missing or broken, was changed, or holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} is missing or broken ({error}): it must be made again") from error
    if checked and not _is_sealed(tensors, metadata):
        raise UsageError(f"{path} was changed since it was written: it must be made again")
    held = metadata.get(DIGEST, "").partition(" of ")[2]
    if of and held and held != of:
        raise UsageError(f"{path} holds {held}, not {of}: it must be made again")
    return tensors


def room_for(shape: Sequence[int]) -> Tensor:
    """An empty float32 tensor; a large one is mapped to a file that ends with the process.

    So a set of many images does not have to fit into memory.
    """
    count = math.prod(shape)
    if 4 * count < LARGE:
        return torch.empty(shape)
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.truncate(4 * count)
            return torch.from_file(file.name, True, count, dtype=torch.float32).view(*shape)
    except OSError as error:
        raise UsageError(
            f"cannot write {4 * count / 1e9:.1f} GB below {folder}: {error.strerror}; "
            "set HARNESS_CACHE to another folder"
        ) from error


def header_of(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """The metadata of a safetensors file and the shapes of its tensors, which are not read.

    Raises UsageError if the file is missing or broken.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, it is no mapping
            return file.metadata() or {}, shapes
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{path} is not a readable safetensors file: {error}; fetch it or make it again"
        ) from error


def written_digest(path: Path) -> str:
    """The digest that a file of `write_sealed` states; its tensors are not read.

    Raises UsageError if the file is missing or broken.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata()[DIGEST]
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is missing or broken ({error}); delete it") from error


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hash(path: Path, sha256: str | None) -> None:
    """Raises UsageError if a file is missing or has another SHA-256; None takes any."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    if sha256 and (found := file_hash(path)) != sha256:
        raise UsageError(
            f"{path} has SHA-256 {found}, but {sha256} was expected: "
            "the file was changed or is not the right one; put the right one there"
        )


def found_hash(path: Path) -> str:
    """`file_hash`, once for each state of a file in a process.

    Raises UsageError if there is no such file.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise UsageError(f"there is no file {path}") from error
    return _hash_of_state(path, state.st_size, state.st_mtime_ns)


@cache
def _hash_of_state(path: Path, size: int, changed: int) -> str:
    return file_hash(path)


def digest(value: Any) -> str:
    """SHA-256 of a JSON-like value in canonical form (sorted keys, no spaces), hexadecimal.

    Raises ValueError for NaN.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of named tensors: names, types, shapes and bytes."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        bits = BITS.get(tensor.dtype)
        array = (tensor.view(bits) if bits else tensor).numpy()
        kind = str(tensor.dtype).removeprefix("torch.") if bits else array.dtype.str
        whole.update(f"{name}\0{kind}\0{array.shape}\0".encode())
        whole.update(array.reshape(-1).view(np.uint8).data)
    return whole.hexdigest()


@contextmanager
def environment_with(**values: str) -> Iterator[None]:
    """Sets environment variables inside the block and restores them afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def cache_folder() -> Path:
    """The folder of cached trajectories and samples: `HARNESS_CACHE`, or the platform's."""
    return Path(
        os.environ.get("HARNESS_CACHE") or platformdirs.user_cache_path("distillation-harness")
    )


def data_folder() -> Path:
    """The folder of data sets and downloads: `HARNESS_DATA`, or `data` in the cache folder."""
    return Path(os.environ.get("HARNESS_DATA") or cache_folder() / "data")
