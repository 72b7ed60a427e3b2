"""Step distillation: regression of the next point of the teacher's trajectory.

This is the baseline of arXiv 2504.11295. The trajectory is read at S + 1 points, noise first.
Training is teacher-forced: one forward pass over all S states, and the mean of S unweighted squared
errors. Sampling takes S steps.

`TrajectoryDistillation` also serves a student that attends to earlier states (`ard.py`). Here each
step has its own state alone.

The defaults regress noisy states by one shared head in the teacher's parametrisation. The released
code regresses x_0-predictions directly, by one head for each step (`protocol: released`).

Untrained, the student under the defaults is the unguided teacher under S-step DDIM.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Denoiser, Guided
from harness.errors import UsageError
from harness.methods.base import METHODS, Batch, Loss, Method, Problem, Update
from harness.methods.parts.adversarial import Adversary
from harness.methods.parts.matching import MatchingStage
from harness.methods.parts.options import Span
from harness.methods.parts.players import Player
from harness.methods.parts.points import (
    PROTOCOLS,
    RELEASED_GRID,
    CachedSteps,
    DistillationConfig,
    Points,
)
from harness.networks.backbones import build, depth_of
from harness.networks.history import History, with_history
from harness.networks.masks import Visible, causal
from harness.solvers import DDIM, Trajectory, sample, trace

TUNES: dict[str, Span | tuple[Any, ...]] = {
    "lr": Span(1e-4, 1e-2, log=True),
    "protocol": tuple(PROTOCOLS),
    "own_history": (0.0, 0.5),
}
"""What a search varies without history; every combination is valid."""


class Stage(Protocol):
    """An addition to the regression from step `start` on: a further player and its updates."""

    name: str
    start: int
    player: Player

    def student_update(self, step: int) -> int:
        """The number of the student's update at a step of the run."""

    def updates(self, step: int, loss: Loss) -> list[Update]:
        """The updates of a step, given the student's own loss."""

    def sums(self) -> Sequence[Tensor]: ...

    def end_step(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrajectoryDistillation(Method):
    """The base of methods that regress the next point of the teacher's trajectory."""

    sources = frozenset({"trajectory"})

    def __init__(
        self,
        config: DistillationConfig,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
    ):
        assert teacher is not None
        self.config = config
        self.teacher_network = teacher.denoiser.network if task.network_teacher else None
        network = self.network(config, task, num_steps)
        if self.teacher_network is not None:
            config.start_from_teacher(network, self.teacher_network)
        updates = (
            total_steps
            if config.dmd_from is None
            else MatchingStage.student_updates(config, total_steps)
        )
        self.players = {"student": config.player(network, updates)}
        ema = self.players["student"].ema
        assert ema is not None
        self.student = ema.module
        self.points = Points.of(config, task, num_steps)
        self.levels = self.points.levels
        self.trained_points = [Points.of(config, task, n) for n in config.step_counts]
        self.solver = CachedSteps(self.points)
        self.stage: Stage | None = None
        if config.gan_from is not None:
            head = network.last_layer(network.head_of(num_steps - 1))
            self.stage = Adversary(config, teacher, task, head, total_steps)
            self.players["student"].rate = self.stage.student_rate
        elif config.dmd_from is not None:
            self.stage = MatchingStage(config, teacher, task, total_steps)
        if self.stage is not None:
            self.players[self.stage.name] = self.stage.player
            self.sources = self.sources | {"data"}

    @classmethod
    def reads_data(cls, config: Any, total_steps: int) -> bool:
        return bool(total_steps) and (config.gan_from, config.dmd_from) != (None, None)

    @classmethod
    def network(cls, config: DistillationConfig, task: Problem, num_steps: int) -> History:
        """A student's network with new weights."""
        history_layers, visible = cls.history(config)
        network = build(
            task.network_options,
            scalars=("step_size",) if config.step_counts else (),
            extra_channels=task.shape[0] if config.noise_channels else 0,
        )
        return with_history(network, num_steps, history_layers, visible, config.heads == "per_step")

    @staticmethod
    def history(config: Any) -> tuple[int, Visible]:
        """The number of lowest layers that attend to earlier states, and the visible states."""
        return 0, causal

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        config.check_options(task, num_steps)
        for count in (num_steps, *config.step_counts) if config.grid == "task" else ():
            if task.trajectory_steps % count:
                divisors = [
                    n for n in range(1, task.trajectory_steps + 1) if task.trajectory_steps % n == 0
                ]
                raise UsageError(
                    f"{'num_steps' if count == num_steps else 'step_counts'} is {count}, but must "
                    f"divide the {task.trajectory_steps} evaluations of the task's trajectories: "
                    f"one of {', '.join(map(str, divisors))}"
                )
        depth = depth_of(task.network_options)
        if (layers := cls.history(config)[0]) > depth:
            raise UsageError(
                f"history_layers is {layers}, but the teacher has {depth} layers: give 0 to {depth}"
            )

    @classmethod
    def trajectory_grid(cls, config: Any) -> tuple[str, int] | None:
        return RELEASED_GRID if config.grid == "released" else None

    @classmethod
    def output(cls, config: Any, task: Problem) -> str:
        if config.parametrization == "teacher":
            return task.prediction_type if task.network_teacher else "v"
        return "the next noisy state" if config.trajectory == "states" else "x_0"

    def teacher_points(self, trajectory: Trajectory) -> Tensor:
        x, target = self.points.inputs_and_targets(trajectory)
        return torch.cat([x, target[:, -1:]], 1)

    def continue_optimizer(self, state: dict[str, Tensor] | None) -> None:
        """A GAN stage from the first step on continues a finished student with its optimizer.

        Raises UsageError if that run has no optimizer state that fits.
        """
        if self.config.gan_from != 0:
            return
        if not state:
            raise UsageError(
                "gan_from is 0, which continues the optimizer of the run in init_from, "
                "but that run has kept none: train it again, or give gan_from above 0"
            )
        self.players["student"].load_optimizer_state(state)

    def untrained_sampler(self) -> Callable[[Tensor, Condition], Tensor] | None:
        """The unguided teacher under DDIM, for the teacher's parametrisation and shared heads.

        This holds without history and with each state's own time.
        """
        alone = len(self.levels) == 2 or (
            self.history(self.config)[0] == 0 and self.config.time_embedding == "per_state"
        )
        if self.teacher_network is None or self.config.parametrization != "teacher" or not alone:
            return None
        teacher = Denoiser(self.teacher_network, self.points.schedule, self.points.prediction_type)
        return lambda x_T, cond: sample(DDIM(), teacher, x_T, self.levels, cond)

    def updates(self, step: int) -> Iterable[Update]:
        if not self.config.step_counts:
            return self.staged_updates(step, self.loss)
        number = (
            step
            if self.stage is None or step < self.stage.start
            else self.stage.student_update(step)
        )
        points = self.trained_points[number % len(self.trained_points)]
        found = self.staged_updates(step, partial(self.loss, points=points))
        return [
            replace(update, phase=f"{update.phase} {len(points.levels) - 1} steps".lstrip())
            for update in found
        ]

    def staged_updates(self, step: int, loss: Loss) -> list[Update]:
        """The updates of a step, with those of the stage once it has begun."""
        if self.stage is None or step < self.stage.start:
            return [Update("student", loss)]
        return self.stage.updates(step, loss)

    def sums(self) -> Sequence[Tensor]:
        return self.stage.sums() if self.stage else ()

    def end_step(self, step: int, means: dict[str, float]) -> Collection[str]:
        if self.stage is not None and step >= self.stage.start:
            self.stage.end_step()
        return ()

    def state_dict(self) -> dict[str, Any]:
        return self.stage.state_dict() if self.stage else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.stage:
            self.stage.load_state_dict(state)

    @classmethod
    def trained_once(cls, config: Any) -> bool:
        return bool(config.step_counts)

    def loss(self, batch: Batch, points: Points | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of S squared errors, of an eps network's DDIM steps times alpha_t.

        Inputs are the teacher's points, or for the share `own_history` the student's own.
        """
        assert batch.trajectory is not None
        points, path = points or self.points, batch.trajectory
        x, target = points.inputs_and_targets(path)
        if self.config.own_history:
            own = (batch.uniform("own history") < self.config.own_history).reshape(-1, 1, 1, 1, 1)
            x = torch.where(own, self.own_points(points, x[:, 0], path.cond), x)
        times = points.times.to(x.device).expand(x.shape[:2])
        inputs, cond = (
            points.network_input(x, x[:, 0]),
            path.cond.with_scalars(**points.scalars(len(x), x.device)),
        )
        output, _ = self.players["student"].module(inputs, times, cond)
        t, s = (grid.repeat(len(x)) for grid in (points.levels[:-1], points.levels[1:]))
        answer = points.answer(
            output[:, :, : x.shape[2]].flatten(0, 1), x.flatten(0, 1), t, s
        ).unflatten(0, x.shape[:2])
        off, last = answer - target, answer.detach()
        # The answer at t = 0 is an x_0; what a stage adds has the same factor as the regression.
        batch.carry["x_0"] = (last + points.evened(answer - last))[:, -1]
        errors = off.detach().square().mean((0, 2, 3, 4))
        metrics = {f"mse_step{i + 1}": error for i, error in enumerate(errors)}
        return points.evened(off).square().mean(), metrics

    @torch.no_grad()
    def own_points(self, points: Points, x_T: Tensor, cond: Condition) -> Tensor:
        """The inputs of the student's own sampling from x_T [B, C, H, W], as [B, S, C, H, W]."""
        return trace(
            CachedSteps(points), self.players["student"].module, x_T, points.levels, cond
        ).states[:, :-1]


@METHODS.register("step-distillation")
class StepDistillation(TrajectoryDistillation):
    """Step distillation: each step regresses the trajectory's next point from its own state."""

    Config = DistillationConfig
    tunes: ClassVar = TUNES
    reference: ClassVar = "Kim et al. 2025, arXiv 2504.11295, sec. 3.1 and table 1 (its baseline)"

    @classmethod
    def canonical(cls, config: Any, num_steps: int) -> tuple[str, Any]:
        # one step from noise to data has one head, one time and, for every trajectory, one pair
        if num_steps == 1 and not config.step_counts:
            kind = (
                {"trajectory": "predictions", "heads": "per_step"}
                if config.parametrization == "direct"
                else {"heads": "shared"}
            )
            config = config.model_copy(
                update={**kind, "time_embedding": "per_state", "own_history": 0.0}
            )
        return METHODS.name_of(cls), config.without_idle_stages()
