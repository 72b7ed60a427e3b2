"""The trajectory store: a teacher's ODE paths, computed once, in memory-mapped safetensors shards.

The SHA-256 of everything that determines a trajectory names the store's folder; their number does
not. So a store grows when more are asked for. Shards are written aside and renamed under a lock: an
interrupted build resumes, and two processes share one store.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import ranks
from harness.data.cache import locked_folder
from harness.data.recipe import Recipe, compute
from harness.data.shards import Shards, check_disk, damaged, error_of, halved, remember
from harness.diffusion.conditions import Conditions
from harness.diffusion.denoiser import Model
from harness.errors import UsageError
from harness.files import cache_folder, digest, map_tensors, write_sealed
from harness.networks.compiling import compiled
from harness.progress import Progress
from harness.provenance import meaning_digest
from harness.seals import made_again, read_sealed_json, write_sealed_json
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
MANIFEST = "manifest.json"
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
    """What a store says of itself: `count`, `shard_size`, and the names of its `shards`.

    A store without a manifest, or with a damaged one, is an unfinished one: its shards say what
    they hold.
    """
    path = folder / MANIFEST
    if path.exists():
        with suppress(OSError, ValueError):
            return read_sealed_json(path)
    return {"count": 0, "shards": []}


def missing_count(recipe: Recipe) -> int:
    """How many trajectories of a recipe are still to be computed, apart from unfinished builds."""
    return max(0, recipe.count - read_manifest(store_folder(recipe))["count"])


def _damaged(recipe: Recipe) -> dict[str, str]:
    """The damaged shards that a recipe needs, each with a reason; see `shards.damaged`."""
    folder = store_folder(recipe)
    manifest = read_manifest(folder)
    needed = -(-recipe.count // manifest.get("shard_size", 1))
    return damaged(folder, manifest["shards"][:needed], _rows)


def _rows(path: Path) -> dict[str, Tensor]:
    """The tensors of a shard. Raises UsageError if it is missing, damaged or of another place."""
    return map_tensors(path, of=f"{path.parent.name}/{path.name}")


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
    equals one that was built at once. A damaged shard is computed again, and stderr says so.

    Args:
        teacher: the guided teacher of the recipe.
        shard_size, batch_size: trajectories in a file, and in one call of the solver.
        conditions: the prompts, if the conditions are not class labels.

    Raises:
        UsageError: if the cache folder cannot be written or its disk is too small, or if a number
            does not fit float16.
    """
    folder, conditions = store_folder(recipe), conditions or Conditions(recipe.num_classes)

    def incomplete() -> bool:
        return bool(missing_count(recipe) or _damaged(recipe))

    if ranks.told_by_first(incomplete):
        with locked_folder(folder):
            if ranks.told_by_first(incomplete):
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
    """Computes what is missing or damaged, shard by shard, and writes the manifest.

    Each rank computes every n-th shard.
    """
    old = ranks.told_by_first(lambda: read_manifest(folder))
    bad = ranks.told_by_first(lambda: damaged(folder, old["shards"], _rows))
    if ranks.is_first() and not old["shards"] and (folder / MANIFEST).exists():
        made_again(folder / MANIFEST, "it is damaged, or of an older version")
    size, whole = old.get("shard_size", shard_size), max(recipe.count, old["count"])
    paths = list[Path]()
    for first in range(0, whole, size):
        path = folder / f"{first // size:05d}-of-{size}.safetensors"
        paths.append(path)
        rows = min(size, whole - first)
        if (first // size) % ranks.count() != ranks.number():
            continue
        if first + size <= old["count"] and path.name not in bad:
            continue
        there = _rows_there(path, bad.get(path.name))
        have = len(there["states"]) if there else 0
        if have >= rows:
            continue
        kept = have // batch_size * batch_size
        parts = [{name: tensor[:kept] for name, tensor in there.items()}] if kept else []
        starts = range(first + kept, first + rows, batch_size)
        for start in starts:
            parts.append(made(torch.arange(start, min(start + batch_size, first + rows))))
        made_here = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        write_sealed(path, made_here, of=f"{folder.name}/{path.name}")
    ranks.wait()
    ranks.told_by_first(lambda: _finish(folder, replace(recipe, count=whole), size, paths))


def _rows_there(path: Path, why: str | None) -> dict[str, Tensor]:
    """The tensors of a shard that an earlier build left; none if they are missing or damaged.

    Args:
        why: why the shard is known to be damaged, or None.
    """
    if path.exists() and why is None:
        try:
            return _rows(path)
        except UsageError as error:
            why = str(error)
    if why is not None:
        made_again(path, why)
    return {}


def _finish(folder: Path, recipe: Recipe, size: int, paths: list[Path]) -> None:
    """Writes the manifest of a store whose shards are all there."""
    content = {
        "recipe": asdict(recipe),
        "count": recipe.count,
        "shard_size": size,
        "shards": [path.name for path in paths],
        **({"error": error_of(paths, PARTS)} if recipe.dtype == "float16" else {}),
    }
    write_sealed_json(folder / MANIFEST, content)
    remember(folder, [path.name for path in paths])
