"""The trajectory store: a teacher's ODE paths, computed once, in memory-mapped safetensors shards.

The SHA-256 of everything that determines the content names the store's folder. Shards are written
aside and renamed under a lock. So an interrupted build resumes, and two processes share one store.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from harness.data.cache import locked_folder
from harness.diffusion.conditions import Conditions
from harness.diffusion.denoiser import Model
from harness.diffusion.randomness import Keyed
from harness.diffusion.schedules import GRIDS
from harness.errors import UsageError
from harness.files import cache_folder, digest, map_tensors, write_mapped, write_text
from harness.progress import Progress
from harness.provenance import code_digest
from harness.solvers import SOLVERS, Trajectory, trace


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the content of a store.

    Attributes:
        teacher: SHA-256 of the teacher's weights file.
        schedule, prediction_type: the schedule's name and the teacher's prediction type.
        guidance_scale, guidance_channels: the teacher's guidance.
        solver, steps: the solver's name and its number of steps K.
        count, seed: number of trajectories and the seed of their noise.
        shape: [C, H, W] of a state.
        num_classes: number of conditions; sample i has condition i mod `num_classes`.
        conditions: SHA-256 of the prompts, if the conditions are prompts.
        grid: the name of the grid of levels; see `GRIDS`.
        code: digest of the sources that compute trajectories.
    """

    teacher: str
    schedule: str
    prediction_type: str
    guidance_scale: float
    guidance_channels: int | None
    solver: str
    steps: int
    count: int
    seed: int
    shape: tuple[int, int, int]
    num_classes: int
    conditions: str = ""
    grid: str = "few-step"
    code: str = field(default_factory=lambda: code_digest("data"))

    @property
    def levels(self) -> Tensor:
        """Timesteps of the states, [K + 1], float64."""
        return GRIDS[self.grid](self.steps)

    def of_run(self, seed: int, grid: tuple[str, int] | None = None) -> Recipe:
        """The recipe of a run with this seed: seeds have noise of their own.

        Args:
            grid: the name and K of the grid that the run's method asks for, if any.
        """
        name, steps = grid or (self.grid, self.steps)
        return replace(self, seed=self.seed + seed, grid=name, steps=steps)


class TrajectoryStore:
    """Trajectories by item number. `open_store` opens a store."""

    def __init__(self, folder: Path, recipe: Recipe, conditions: Conditions):
        self.folder, self.recipe, self.conditions = folder, recipe, conditions
        self.levels = recipe.levels
        manifest = folder / "manifest.json"
        try:
            content = json.loads(manifest.read_text())
            shards, self._shard_size = (
                [map_tensors(folder / name) for name in content["shards"]],
                content["shard_size"],
            )
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(
                f"{manifest} is broken; delete the folder {folder}, and the next run rebuilds it"
            ) from error
        self._parts = {key: [shard[key] for shard in shards] for key in ("states", "predictions")}

    def __len__(self) -> int:
        return self.recipe.count

    def batch(self, items: Tensor) -> Trajectory:
        """Trajectories of items [B], float32.

        States are [B, K + 1, C, H, W], predictions [B, K, C, H, W].
        """
        place = [divmod(int(item), self._shard_size) for item in items]

        def rows(key: str) -> Tensor:
            return torch.stack([self._parts[key][shard][row] for shard, row in place])

        return Trajectory(
            rows("states"), rows("predictions"), self.levels, self.conditions.balanced(items)
        )


@torch.no_grad()
def _compute(
    recipe: Recipe, conditions: Conditions, teacher: Model, items: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """States and predictions of items [B]."""
    x_T = Keyed("trajectory", recipe.seed).normal("x_T", items, recipe.shape).to(device)
    cond = conditions.balanced(items).to(device)
    path = trace(SOLVERS[recipe.solver](), teacher, x_T, recipe.levels, cond)
    return {"states": path.states, "predictions": path.predictions}


def store_folder(recipe: Recipe) -> Path:
    """The folder of a recipe's store, which is complete once it holds `manifest.json`."""
    return cache_folder() / "trajectories" / digest(asdict(recipe))[:32]


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
    """The store of a recipe, after computing its missing shards.

    Args:
        teacher: the guided teacher of the recipe.
        shard_size, batch_size: trajectories in a file, and in one call of the solver.
        conditions: the prompts, if the conditions are not class labels.

    Raises:
        UsageError: if a shard was damaged or the cache folder cannot be written.
    """
    folder, conditions = store_folder(recipe), conditions or Conditions(recipe.num_classes)
    if not (folder / "manifest.json").exists():
        with locked_folder(folder):
            if not (folder / "manifest.json").exists():
                _build(
                    folder, recipe, conditions, teacher, device, shard_size, batch_size, progress
                )
    return TrajectoryStore(folder, recipe, conditions)


def _build(
    folder: Path,
    recipe: Recipe,
    conditions: Conditions,
    teacher: Model,
    device: torch.device,
    shard_size: int,
    batch_size: int,
    progress: Progress | None,
) -> None:
    names = []
    for first in range(0, recipe.count, shard_size):
        path = folder / f"{first // shard_size:05d}-of-{shard_size}.safetensors"
        last = min(first + shard_size, recipe.count)
        if path.exists():
            map_tensors(path)  # raises if an earlier build left it damaged
        else:
            batches = []
            for start in range(first, last, batch_size):
                items = torch.arange(start, min(start + batch_size, last))
                batches.append(_compute(recipe, conditions, teacher, items, device))
                if progress:
                    progress(int(items[-1]) + 1, recipe.count)
            write_mapped(path, {key: torch.cat([b[key] for b in batches]) for key in batches[0]})
        names.append(path.name)
    write_text(
        folder / "manifest.json",
        json.dumps({"recipe": asdict(recipe), "shard_size": shard_size, "shards": names}, indent=1),
    )
