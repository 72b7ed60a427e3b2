"""A method on a small task, as the contract's checks build, train and sample it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.data.trajectories import open_store
from harness.diffusion.randomness import keyed_initialisation
from harness.errors import UsageError
from harness.methods import METHODS, Batch, Method
from harness.solvers import sample
from harness.tasks import Task
from harness.training.settings import TrainSettings
from harness.training.tiny_task import as_teacher
from harness.training.trainer import Trainer

CPU = torch.device("cpu")
STEPS, BATCH = 10, 8
"""Training steps of a case, and samples per step."""


@dataclass
class Case:
    """A method with options, on a task.

    Attributes:
        name, options: name and options of the method.
        task: usually `tiny_task`.
        folder: a folder for what checks write; the trajectories go to `HARNESS_CACHE`.
        num_steps: sampling steps of the student.
        device: the device on which the method is built, trained and sampled.
        flops: FLOPs of a sample by loss, which the trainers of a check count once together.
    """

    name: str
    task: Task
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)
    num_steps: int = 2
    device: torch.device = CPU
    flops: dict[str, float] = field(default_factory=dict)

    @property
    def cls(self) -> type[Method]:
        return METHODS[self.name]

    @property
    def config(self) -> Any:
        return self.cls.Config(**self.options)

    @cached_property
    def sources(self) -> dict[str, Any]:
        return {
            "data": self.task.split.train,
            "trajectory": open_store(
                self.task.recipe.of_run(0, self.cls.trajectory_grid(self.config)),
                self.task.teacher(self.device),
                self.device,
                conditions=self.task.conditions,
            ),
        }

    def teachers(self) -> tuple[Case, Case]:
        """The case with its teacher as a predictor of eps on DiT's schedule, and of v on a flow."""
        kinds = (("vp", "eps"), ("flow", "v"))
        return tuple(replace(self, task=as_teacher(self.task, *kind)) for kind in kinds)  # type: ignore[return-value]

    def step_counts(self) -> list[int]:
        """Which of 1 and 4 steps the method takes; 4 alone if they share training."""
        found = []
        for count in (4,) if self.cls.trained_once(self.config) else (1, 4):
            with suppress(UsageError):
                self.cls.check(self.config, self.task, count)
                found.append(count)
        return found or [self.num_steps]

    def build(
        self, teacher: Any = None, num_steps: int | None = None, total_steps: int = STEPS
    ) -> Method:
        with keyed_initialisation(0, self.name):
            steps = num_steps or self.num_steps
            teacher = teacher or self.task.teacher(self.device)
            method = self.cls(self.config, teacher, self.task, steps, total_steps)
        method.to(self.device)
        return method

    def trainer(
        self,
        method: Method,
        folder: Path | None = None,
        seed: int = 0,
        teacher: nn.Module | None = None,
        sharded: bool = False,
        **settings: Any,
    ) -> Trainer:
        whole = TrainSettings(STEPS, BATCH, seed, log_every=1, **settings)
        more = {"teacher": teacher, "sharded": sharded}
        trainer = Trainer(method, self.sources, whole, folder, self.device, **more)  # type: ignore[arg-type]
        trainer.known_flops = self.flops
        return trainer

    def batch(self, method: Method) -> Batch:
        return self.trainer(method).batches.of_step(0)[0]

    def sample(self, method: Method, rows: slice = slice(0, 3)) -> Tensor:
        x_T, cond = self.task.evaluation_inputs(0)
        x_T, cond = x_T[rows].to(self.device), cond[rows].to(self.device)
        noise = self.task.evaluation_noise(0, rows)
        with torch.no_grad():
            return sample(method.solver, method.student, x_T, method.levels, cond, noise)


def weights(method: Method) -> dict[str, Tensor]:
    """Copies of all trained and all averaged weights, by name."""
    found: dict[str, Tensor] = {}
    for name, player in method.players.items():
        found |= {
            f"{name}.{key}": value.clone() for key, value in player.module.state_dict().items()
        }
        if player.ema:
            found |= {
                f"{name}.ema.{key}": value.clone()
                for key, value in player.ema.module.state_dict().items()
            }
    return found


def losses(trainer: Trainer) -> list[float]:
    """Every player's losses along the curve."""
    return [
        value for point in trainer.curve for key, value in point.items() if key.endswith("loss")
    ]


def all_close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Raises AssertionError if two tensors differ by more than a tolerance.

    The tolerance is both absolute and relative.
    """
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}"
    )
