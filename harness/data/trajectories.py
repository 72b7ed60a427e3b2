"""The trajectory store: a teacher's ODE paths, computed once, in memory-mapped safetensors shards.

A store lives in a folder named by the SHA-256 of everything that determines its content, under `cache_folder()`. Shards are
written aside and renamed under a lock, so an interrupted build goes on where it stopped and two processes share one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import safe_open
from torch import Tensor

from harness.conditions import balanced_labels
from harness.denoiser import Model
from harness.errors import UsageError
from harness.files import cache_folder, digest, file_hash, write_tensors, write_text
from harness.randomness import Keyed
from harness.schedules import few_step_levels
from harness.solvers import SOLVERS, Trajectory, integrate

Progress = Callable[[int, int], None]
"""Called with the number of items done and the number of all."""


@dataclass(frozen=True)
class Recipe:
    """How trajectories are made; with the teacher's hash it names their content.

    Attributes:
        teacher: SHA-256 of the teacher's weights file.
        guidance_scale, guidance_channels: the guidance under which the teacher is asked.
        solver, steps: the solver's name and its number of steps K, on the levels of `few_step_levels(K)`.
        count, seed: how many trajectories, with balanced labels, and the seed of their noise.
        shape: [C, H, W] of a state.
        num_classes: labels are sample number mod `num_classes`.
        version: raised when the meaning of a field changes.
    """

    teacher: str
    guidance_scale: float
    guidance_channels: int | None
    solver: str
    steps: int
    count: int
    seed: int
    shape: tuple[int, int, int]
    num_classes: int
    version: int = 1


class TrajectoryStore:
    """Finished trajectories, read by item number. Open one with `open_store`."""

    def __init__(self, folder: Path, recipe: Recipe):
        self.folder, self.recipe = folder, recipe
        self.levels = few_step_levels(recipe.steps)
        manifest = json.loads((folder / "manifest.json").read_text())
        parts: dict[str, list[Tensor]] = {"states": [], "predictions": []}
        for name, expected in manifest["shards"].items():
            path = folder / name
            if not path.is_file() or file_hash(path) != expected:
                raise UsageError(f"shard {path} is missing or was changed; delete the folder {folder} and it is made again")
            with safe_open(path, framework="pt") as file:
                for key, tensors in parts.items():
                    tensors.append(file.get_tensor(key))
        self._parts, self._shard_size = parts, manifest["shard_size"]

    def __len__(self) -> int:
        return self.recipe.count

    def batch(self, items: Tensor) -> Trajectory:
        """Trajectories of these items: states [B, K + 1, C, H, W], predictions [B, K, C, H, W], float32."""
        place = [divmod(int(item), self._shard_size) for item in items]

        def rows(key: str) -> Tensor:
            return torch.stack([self._parts[key][shard][row] for shard, row in place])

        return Trajectory(rows("states"), rows("predictions"), self.levels, balanced_labels(items, self.recipe.num_classes))


@torch.no_grad()
def _compute(recipe: Recipe, teacher: Model, items: Tensor, device: torch.device) -> dict[str, Tensor]:
    """States and predictions of some items."""
    x_T = Keyed("trajectory", recipe.seed).normal("x_T", items, recipe.shape).to(device)
    cond = balanced_labels(items, recipe.num_classes).to(device)
    path = integrate(SOLVERS[recipe.solver](), teacher, x_T, few_step_levels(recipe.steps), cond, save=True)
    assert isinstance(path, Trajectory)
    return {"states": path.states, "predictions": path.predictions}


def open_store(recipe: Recipe, teacher: Model, device: torch.device, *, shard_size: int = 1024, batch_size: int = 256,
               progress: Progress | None = None) -> TrajectoryStore:  # fmt: skip
    """The store of a recipe; what is missing of it is computed first.

    Args:
        teacher: the guided teacher that the recipe names.
        shard_size, batch_size: trajectories a file, and how many are integrated at once.

    Raises:
        UsageError: if a shard was damaged or the cache folder cannot be written.
    """
    folder = cache_folder() / "trajectories" / digest(asdict(recipe))[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write the cache folder {folder}: {error.strerror}; set HARNESS_CACHE to another") from error
    with FileLock(folder / "lock"):
        if not (folder / "manifest.json").exists():
            _build(folder, recipe, teacher, device, shard_size, batch_size, progress)
    return TrajectoryStore(folder, recipe)


def _build(folder: Path, recipe: Recipe, teacher: Model, device: torch.device, shard_size: int, batch_size: int,
           progress: Progress | None) -> None:  # fmt: skip
    shards = {}
    for first in range(0, recipe.count, shard_size):
        path = folder / f"{first // shard_size:05d}-of-{shard_size}.safetensors"
        last = min(first + shard_size, recipe.count)
        if not path.exists():
            batches = []
            for start in range(first, last, batch_size):
                items = torch.arange(start, min(start + batch_size, last))
                batches.append(_compute(recipe, teacher, items, device))
                if progress:
                    progress(int(items[-1]) + 1, recipe.count)
            write_tensors(path, {key: torch.cat([b[key] for b in batches]) for key in batches[0]})
        shards[path.name] = file_hash(path)
    write_text(folder / "manifest.json", json.dumps({"recipe": asdict(recipe), "shard_size": shard_size, "shards": shards}, indent=1))


def cached_samples(key: dict, compute: Callable[[], Tensor]) -> Tensor:
    """Samples [n, C, H, W] that are determined by a JSON-like key, from the cache or computed and kept there."""
    path = cache_folder() / "samples" / f"{digest(key)[:32]}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            with safe_open(path, framework="pt") as file:
                return file.get_tensor("samples").clone()
        samples = compute()
        write_tensors(path, {"samples": samples})
        return samples.cpu()
