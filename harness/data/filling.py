"""A folder of shards, computed once: by any number of processes, resumable.

A folder has `plan.json`, which says what its shards hold and how they are made. Each rank makes
every n-th shard that is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.data.cache import intact, locked_folder
from harness.data.shards import check_disk
from harness.errors import UsageError
from harness.files import digest, map_tensors, write_sealed, write_text
from harness.progress import Progress
from harness.seals import read_sealed_json

PLAN = "plan.json"


def fill(
    folder: Path,
    plan: dict[str, Any],
    count: int,
    shard_size: int,
    make: Callable[[range], Iterable[dict[str, Tensor]]],
    *,
    what: str,
    size: float,
    rank: int = 0,
    ranks: int = 1,
    progress: Progress | None = None,
) -> list[Path]:
    """Makes the shards of one rank that are missing or damaged.

    Args:
        plan: what decides the shards, JSON-like; a folder with another plan is refused.
        count: number of items, cut into shards of `shard_size`.
        make: from the items of a shard to their tensors by name, a batch at a time.
        what: what the shards hold, as an error names it.
        size: bytes of one item.

    Returns:
        The paths of all shards; those of other ranks may be missing.

    Raises:
        UsageError: if the folder has another plan, or if the disk is too small.
    """
    _continue(folder, json.loads(json.dumps(plan)), what)
    paths = [
        folder / f"{number:05d}-of-{shard_size}.safetensors"
        for number in range(-(-count // shard_size))
    ]
    key = digest(plan)[:16]
    missing = {
        paths[number]: range(number * shard_size, min((number + 1) * shard_size, count))
        for number in range(rank, len(paths), ranks)
        if not _there(paths[number], key)
    }
    total, done = sum(map(len, missing.values())), 0
    remedy = "name another --out, or give --dtype float16"
    check_disk(f"{total} {what}", float(total * size), folder, remedy)
    for path, shard in missing.items():
        parts = []
        for part in make(shard):
            parts.append(part)
            done += len(next(iter(part.values())))
            if progress:
                progress(done, total)
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        write_sealed(path, whole, of=f"{path.name} of {key}")
    return paths


def _there(path: Path, key: str) -> bool:
    """Whether a shard of a plan is there and not damaged."""
    of = f"{path.name} of {key}"
    return path.exists() and intact(path, lambda: map_tensors(path, of=of))


def _continue(folder: Path, plan: dict[str, Any], what: str) -> None:
    """Writes the plan of a new folder. Raises UsageError if the folder has another plan."""
    with locked_folder(folder, "name another --out"):
        path = folder / PLAN
        if not path.exists():
            write_text(path, json.dumps(plan, indent=1))
            return
        try:
            found = read_sealed_json(path, required=False)
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} is broken; delete the folder {folder}") from error
    check_plan(found, plan, f"{folder} holds {what}")


def check_plan(found: dict[str, Any], plan: dict[str, Any], where: str) -> None:
    """Raises UsageError if what is there was made by another plan.

    Args:
        where: the subject and verb of the sentence, such as "FOLDER holds latents".
    """
    if found != plan:
        names = [name for name in {**found, **plan} if found.get(name) != plan.get(name)]
        raise UsageError(
            f"{where} with another {', '.join(sorted(names))}; name another --out, or delete it"
        )
