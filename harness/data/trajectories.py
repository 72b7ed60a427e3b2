"""The trajectory store: a teacher's ODE paths, computed once, in memory-mapped safetensors shards.

The SHA-256 of everything that determines a trajectory names the store's folder; their number does
not. So a store grows when more are asked for. Shards are written aside and renamed under a lock: an
interrupted build resumes, and two processes share one store.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import ranks
from harness.data.cache import locked_folder
from harness.data.recipe import Recipe, compute
from harness.data.shards import Shards, check_disk, error_of, halved
from harness.diffusion.conditions import Conditions
from harness.diffusion.denoiser import Model
from harness.errors import UsageError
from harness.files import cache_folder, digest, map_tensors, write_mapped, write_text
from harness.networks.compiling import compiled
from harness.progress import Progress
from harness.provenance import meaning_digest
from harness.solvers import SOLVERS, Solver, Trajectory

CODE = (
    "harness.data.recipe",
    "harness.data.mixture",
    "harness.networks.backbones.dit",
    "harness.networks.backbones.diffusers",
)
"""Modules that compute trajectories, beside the solver's and those that all these import."""
ROOMS = frozenset({"data", "diffusion", "networks", "solvers"})
"""Rooms whose code decides what a trajectory is."""
PARTS = ("states", "predictions")
Made = Callable[[Tensor], dict[str, Tensor]]
"""From items [B] to their rows in a shard."""


class TrajectoryStore:
    """Trajectories by item number. `open_store` opens a store."""

    def __init__(self, folder: Path, recipe: Recipe, conditions: Conditions):
        self.folder, self.recipe, self.conditions = folder, recipe, conditions
        self.levels = recipe.levels
        manifest = read_manifest(folder)
        size = manifest["shard_size"]
        paths = [folder / name for name in manifest["shards"][: -(-recipe.count // size)]]
        ranks.told_by_first(lambda: _verify(folder, paths))
        self._shards = Shards(paths, size, checked=False)

    def __len__(self) -> int:
        return self.recipe.count

    def batch(self, items: Tensor) -> Trajectory:
        """Trajectories of items [B], float32.

        States are [B, K + 1, C, H, W], predictions [B, K, C, H, W].
        """
        states, predictions = (self._shards.rows(name, items) for name in PARTS)
        return Trajectory(states, predictions, self.levels, self.conditions.balanced(items))


@cache
def trajectory_code(solver: type[Solver]) -> str:
    """The digest of the code that computes trajectories with a solver; see `meaning_digest`."""
    return meaning_digest(CODE, [solver], ROOMS)


def store_folder(recipe: Recipe) -> Path:
    """The folder of a recipe's store. How many trajectories it holds says its manifest."""
    whole = asdict(recipe)
    del whole["count"]
    for name in ("dtype", "precision", "compile"):  # stores are older than these
        if whole[name] == getattr(Recipe, name):
            del whole[name]
    key = digest({**whole, "code": trajectory_code(SOLVERS[recipe.solver])})
    return cache_folder() / "trajectories" / key[:32]


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a store says of itself. Raises UsageError if it is broken."""
    manifest = folder / "manifest.json"
    try:
        content = json.loads(manifest.read_text())
        return {name: content[name] for name in ("count", "shard_size", "shards")}
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{manifest} is broken; delete the folder {folder}, and the next run rebuilds it"
        ) from error


def missing_count(recipe: Recipe) -> int:
    """How many trajectories of a recipe are still to be computed, apart from unfinished builds."""
    folder = store_folder(recipe)
    there = read_manifest(folder)["count"] if (folder / "manifest.json").exists() else 0
    return max(0, recipe.count - there)


def check_store_disk(recipe: Recipe) -> str:
    """A sentence on the disk that missing trajectories need; "" if none are missing.

    Raises UsageError if less is free.
    """
    count = missing_count(recipe)
    remedy = (
        "set HARNESS_CACHE to a larger disk, lower trajectories.count, "
        "or give trajectories.dtype float16"
    )
    need = float(count * recipe.size)
    return check_disk(f"{count} trajectories", need, cache_folder(), remedy) if count else ""


def open_store(
    recipe: Recipe,
    teacher: Model,
    device: torch.device,
    *,
    shard_size: int = 1024,
    batch_size: int = 256,
    progress: Progress | None = None,
    conditions: Conditions | None = None,
) -> TrajectoryStore:
    """The store of a recipe, after computing its missing trajectories.

    A batch that an earlier, smaller count cut short is computed again, so that an extended store
    equals one that was built at once.

    Args:
        teacher: the guided teacher of the recipe.
        shard_size, batch_size: trajectories in a file, and in one call of the solver.
        conditions: the prompts, if the conditions are not class labels.

    Raises:
        UsageError: if a shard was damaged, if the cache folder cannot be written or its disk is too
            small, or if a number does not fit float16.
    """
    folder, conditions = store_folder(recipe), conditions or Conditions(recipe.num_classes)
    if ranks.told_by_first(lambda: missing_count(recipe)):
        with locked_folder(folder):
            if ranks.told_by_first(lambda: missing_count(recipe)):
                ranks.told_by_first(lambda: check_store_disk(recipe))

                def made(items: Tensor) -> dict[str, Tensor]:
                    found = compute(recipe, conditions, teacher, items, device)
                    if progress:
                        progress(int(items[-1]) + 1, recipe.count)
                    return found if recipe.dtype == "float32" else halved(found, PARTS)

                with compiled(teacher, recipe.compile):
                    _build(folder, recipe, made, shard_size, batch_size)
    return TrajectoryStore(folder, recipe, conditions)


def _build(folder: Path, recipe: Recipe, made: Made, shard_size: int, batch_size: int) -> None:
    """Computes what is missing, shard by shard, and writes the manifest.

    Each rank computes every n-th shard.
    """
    old: dict[str, Any] = {"count": 0, "shard_size": shard_size, "shards": []}
    if (folder / "manifest.json").exists():
        old = read_manifest(folder)
    size, paths = old["shard_size"], list[Path]()
    for first in range(0, recipe.count, size):
        path = folder / f"{first // size:05d}-of-{size}.safetensors"
        paths.append(path)
        rows = min(size, recipe.count - first)
        if first + size <= old["count"] or (first // size) % ranks.count() != ranks.number():
            continue
        there = map_tensors(path) if path.exists() else {}  # raises if it was damaged
        have = len(there["states"]) if there else 0
        if have >= rows:
            continue
        kept = have // batch_size * batch_size
        parts = [{name: tensor[:kept] for name, tensor in there.items()}] if kept else []
        starts = range(first + kept, first + rows, batch_size)
        for start in starts:
            parts.append(made(torch.arange(start, min(start + batch_size, first + rows))))
        write_mapped(path, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    ranks.wait()
    ranks.told_by_first(lambda: _finish(folder, recipe, size, paths))


def _finish(folder: Path, recipe: Recipe, size: int, paths: list[Path]) -> None:
    """Writes the manifest of a store whose shards are all there."""
    content = {
        "recipe": asdict(recipe),
        "count": recipe.count,
        "shard_size": size,
        "shards": [path.name for path in paths],
        **({"error": error_of(paths, PARTS)} if recipe.dtype == "float16" else {}),
    }
    write_text(folder / "manifest.json", json.dumps(content, indent=1))
    _remember(folder, {}, paths)


def _verify(folder: Path, paths: list[Path]) -> None:
    """Raises UsageError if a shard is missing or was changed."""
    known = _stamps(folder)
    for path in paths:
        if not path.exists() or known.get(path.name) != _stamp(path):
            map_tensors(path)
    _remember(folder, known, paths)


def _stamp(path: Path) -> list[int]:
    """A file's size and time of change: a shard is read as a whole only when they are new."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _stamps(folder: Path) -> dict[str, list[int]]:
    """The stamps of shards when their digests were compared, by name."""
    with suppress(OSError, ValueError):
        return json.loads((folder / "verified.json").read_text())
    return {}


def _remember(folder: Path, known: dict[str, list[int]], paths: list[Path]) -> None:
    found = {**known, **{path.name: _stamp(path) for path in paths}}
    if found != known:
        with suppress(UsageError):  # a cache that is only read is compared each time
            write_text(folder / "verified.json", json.dumps(found))
