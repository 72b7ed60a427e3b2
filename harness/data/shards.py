"""Rows of tensors in memory-mapped files, by item number; numbers may be rounded to float16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.documents import parse_json, read_text
from harness.errors import UsageError
from harness.files import map_tensors, write_text

VERIFIED = "verified.json"
"""In a folder of shards: their sizes and times of change when their digests were compared."""


class Shards:
    """Named tensors of many items, cut into files of `size` items.

    Args:
        checked: whether the digest of each file is computed and compared.

    Raises UsageError for a file that is missing or was changed.
    """

    def __init__(self, paths: Sequence[Path], size: int, checked: bool = True):
        self.size, self._files = size, [map_tensors(path, checked) for path in paths]

    def rows(self, name: str, items: Tensor) -> Tensor:
        """One tensor's rows of items [B], as float32 where they are float16: [B, ...]."""
        place = [divmod(item, self.size) for item in items.tolist()]
        found = torch.stack([self._files[file][name][row] for file, row in place])
        return found.float() if found.dtype == torch.float16 else found

    def whole(self, name: str) -> Tensor:
        """One tensor of all items, in memory."""
        return torch.cat([file[name] for file in self._files])


def damaged(folder: Path, names: Iterable[str], check: Callable[[Path], object]) -> dict[str, str]:
    """The shards of a folder that are missing or damaged, each with a reason.

    A shard is read as a whole only when its size or time of change is new, so that opening a large
    store is quick.

    Args:
        check: reads a shard, and raises UsageError for a damaged one.
    """
    known, found, right = _stamps(folder), dict[str, str](), list[str]()
    for name in names:
        path = folder / name
        try:
            if not path.exists() or known.get(name) != _stamp(path):
                check(path)
            right.append(name)
        except UsageError as error:
            found[name] = str(error)
    remember(folder, right)
    return found


def unchanged(path: Path) -> bool:
    """Whether a file has the stamp that `remember` noted."""
    return path.exists() and _stamps(path.parent).get(path.name) == _stamp(path)


def remember(folder: Path, names: Iterable[str]) -> None:
    """Notes the stamps of files in a folder whose digests are known to be right."""
    known = _stamps(folder)
    found = {**known, **{name: _stamp(folder / name) for name in names}}
    if found != known:
        with suppress(UsageError):  # a folder that is only read is compared each time
            write_text(folder / VERIFIED, json.dumps(found))


def _stamp(path: Path) -> list[int]:
    """A file's size and time of change."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _stamps(folder: Path) -> dict[str, list[int]]:
    with suppress(OSError, ValueError):
        found = parse_json(read_text(folder / VERIFIED))
        return found if isinstance(found, dict) else {}
    return {}


def halved(made: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors [B, ...] with the named ones in float16, and with the error of rounding them.

    Returns:
        The tensors, and `errors` [B, names, 3], float64: the largest error, and the sums of squared
        errors and of squares.

    Raises UsageError for numbers that float16 cannot hold.
    """
    found, errors = dict(made), []
    for name in names:
        exact, half = made[name].double().flatten(1), made[name].half()
        if not bool(half.isfinite().all()):
            raise UsageError(
                f"{name} reach {float(exact.abs().max()):.3g}, but float16 ends at 65504: "
                "leave dtype at float32"
            )
        off = half.double().flatten(1) - exact
        parts = [off.abs().amax(1), off.square().sum(1), exact.square().sum(1)]
        found[name] = half
        errors.append(torch.stack(parts, 1))
    return {**found, "errors": torch.stack(errors, 1)}


def error_of(paths: Sequence[Path], names: Iterable[str]) -> dict[str, dict[str, float]]:
    """The largest and the relative root mean squared error of what `halved` rounded, by name."""
    errors = Shards(paths, 1, checked=False).whole("errors")
    return {
        name: {
            "largest": float(part[:, 0].max()),
            "relative_rms": float((part[:, 1].sum() / part[:, 2].sum()).sqrt()),
        }
        for name, part in zip(names, errors.unbind(1), strict=True)
    }


def free_bytes(folder: Path) -> float:
    """Bytes that are free on the disk of a folder, which need not exist yet."""
    there: Any = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return float(shutil.disk_usage(there).free)


def check_disk(what: str, need: float, folder: Path, remedy: str) -> str:
    """A sentence on the bytes that something needs and on those that are free in a folder.

    Args:
        what: the subject of the sentence, such as "3 trajectories".
        remedy: what to do if there is too little.

    Raises UsageError if less is free than is needed.
    """
    free = free_bytes(folder)
    words = f"{what} need {amount(need)}, and {amount(free)} are free in {folder}"
    if need > free:
        raise UsageError(f"{words}: {remedy}")
    return words


def amount(size: float) -> str:
    """A number of bytes in words."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
