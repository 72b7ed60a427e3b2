"""Step distillation: a student regresses the next point of the teacher's trajectory (the baseline of arXiv 2504.11295).

The trajectory is read at S + 1 points, noise first. Training is teacher-forced, one forward over all S states and the mean of
S unweighted squared errors; sampling takes S steps. `TrajectoryDistillation` is written for a student that sees earlier
states, as ARD's does (`ard.py`); here each state is seen alone.

Untrained, under `parametrization: teacher` and `heads: shared` the student is the unguided teacher under S-step DDIM.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from harness.conditions import Condition
from harness.denoiser import Denoiser, Guided, like, predict
from harness.errors import UsageError
from harness.methods.adversarial import Adversary, GANOptions
from harness.methods.base import METHODS, Batch, Loss, Method, Numbers, Player, Problem, Update
from harness.methods.matching import MatchingStage, StageOptions
from harness.networks.history import EMPTY, Cache, HistoryDiT, Visible, causal
from harness.schedules import Schedule, few_step_levels
from harness.solvers import DDIM, Noise, Solver, Trajectory, ddim_step, integrate
from harness.solvers.ddim import implied_x_0


class DistillationConfig(GANOptions, StageOptions):
    """What step distillation and ARD share. The defaults are those of ARD's released code."""

    lr: float = Field(3e-3, gt=0, le=1)
    """Peak learning rate of AdamW (the papers' 1e-4 is for runs of 300,000 steps)."""
    trajectory: Literal["states", "predictions", "renoised"] = "predictions"
    """Points of the trajectory: the teacher's noisy states; its x_0-predictions; or these with the noise mixed in again."""
    heads: Literal["shared", "per_step"] = "per_step"
    """One final layer for all steps, or one for each, copied from the teacher's."""
    parametrization: Literal["direct", "teacher"] = "direct"
    """What the output is: the next point itself, or an eps whose DDIM step gives it (needs noisy states)."""
    time_embedding: Literal["per_state", "constant"] = "per_state"
    """Whether each state carries its own time, or all of them the noise's."""
    noise_channels: bool = False
    """Whether every step sees the noise x_T as further channels, whose weights start at zero."""
    own_history: float = Field(0.0, ge=0, le=1)
    """Share of a batch that is trained on the points where the student's own sampling takes it, towards the teacher's targets."""
    step_counts: Numbers = ()
    """Numbers of steps, as in 1,2,4, that one student is trained for in turn, told the size of a step; none means for its own alone."""

    def check_options(self, task: Problem, num_steps: int) -> None:
        """Raises UsageError for options that contradict each other."""
        if self.parametrization == "teacher" and self.trajectory != "states":
            raise UsageError("parametrization 'teacher' is a DDIM step between noisy states: give trajectory 'states' with it")
        if self.step_counts and num_steps not in self.step_counts:
            counts = ", ".join(map(str, self.step_counts))
            raise UsageError(f"num_steps is {num_steps}, but step_counts say that the student is trained for {counts}: give one of these")
        if self.step_counts and self.heads == "per_step":
            raise UsageError("step_counts make one student for several numbers of steps, with one final layer: give heads 'shared' with it")
        if self.gan_from is not None and self.dmd_from is not None:
            raise UsageError("gan_from and dmd_from are two ways to finish a student: give one")
        for option in ("gan_from", "dmd_from"):
            if getattr(self, option) is not None and not task.network_teacher:
                raise UsageError(f"{option} needs a teacher that is a network, but this task's is a closed formula: leave it out")

    def without_idle_stages(self) -> DistillationConfig:
        """The same; where a stage is off its options are the defaults, so that equal models are equal configs."""
        idle = [stage for stage in ("gan", "dmd") if getattr(self, f"{stage}_from") is None]
        fields = type(self).model_fields.items()
        return self.model_copy(update={name: field.default for name, field in fields if name.split("_")[0] in idle})


class Stage(Protocol):
    """What is added to the regression from step `start` on: a further player and its updates, given the student's own loss."""

    name: str
    start: int
    player: Player

    def updates(self, step: int, loss: Loss) -> list[Update]: ...

    def end_step(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Points:
    """How a student goes through the S + 1 points of a trajectory; point i stands at `levels[i]`.

    Point i is what j = K i / S of the teacher's K evaluations have produced: their noisy state ("states"), the x_0 that the
    last of them returned ("predictions"), or `alpha x_0 + sigma x_T` ("renoised"); point 0 is the noise x_T.
    """

    config: DistillationConfig
    schedule: Schedule
    prediction_type: Any
    levels: Tensor

    def told(self, count: int, device: torch.device) -> dict[str, Tensor]:
        """Numbers [count] that the student is told: of several numbers of steps, the size of one."""
        return {"step_size": torch.full((count,), 1 / (len(self.levels) - 1), device=device)} if self.config.step_counts else {}

    @property
    def times(self) -> Tensor:
        """What the time embedding receives at each of the S steps: the state's true level, 999 (1 - i / S) for x_0-predictions."""
        steps = len(self.levels) - 1
        t = self.levels[:-1]
        if self.config.trajectory == "predictions":
            t = (999 * (1 - torch.arange(steps, dtype=torch.float64) / steps) + 1) / 1000
        if self.config.time_embedding == "constant":
            t = t[:1].expand(steps)
        return self.schedule.network_time(t)

    def inputs_and_targets(self, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        """What the student sees and what it should answer, [B, S, C, H, W] each."""
        every = trajectory.steps // (len(self.levels) - 1)
        if self.config.trajectory == "states":
            states = trajectory.states[:, ::every]
            return states[:, :-1], states[:, 1:]
        x_T, targets = trajectory.states[:, :1], trajectory.predictions[:, every - 1 :: every]
        following = [self.following(targets[:, i], x_T[:, 0], s) for i, s in enumerate(self.levels[1:-1])]
        return torch.cat([x_T, *(x.unsqueeze(1) for x in following)], 1), targets

    def answer(self, output: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """From the network's output for x_t to what is compared with the target, float32 [B, C, H, W]; t and s are 0-d or [B]."""
        if self.config.parametrization == "direct":
            return output.float()
        return ddim_step(predict(output, x_t, t, self.schedule, self.prediction_type), s, self.schedule)

    def following(self, answer: Tensor, x_T: Tensor, s: Tensor) -> Tensor:
        """From an answer to the next point: itself, but with the noise mixed in again under "renoised"."""
        if self.config.trajectory != "renoised":
            return answer
        alpha, sigma = (like(c, answer) for c in self.schedule.alpha_sigma(s))
        return alpha * answer + sigma * x_T

    def x_0(self, answer: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The x_0 that an answer implies: itself, but between noisy states the one from which DDIM leads there."""
        return implied_x_0(x_t, answer, t, s, self.schedule) if self.config.trajectory == "states" else answer

    def network_input(self, x: Tensor, x_T: Tensor) -> Tensor:
        """States [B, S, C, H, W], with the noise [B, C, H, W] as further channels where the student has them."""
        return torch.cat([x, x_T.unsqueeze(1).expand_as(x)], 2) if self.config.noise_channels else x


@dataclass(frozen=True)
class Progress:
    """What sampling carries: the noise [B, C, H, W] and the cache of the states so far."""

    x_T: Tensor
    cache: Cache


class CachedSteps(Solver):
    """S steps of a student, each on the cache of those before."""

    def __init__(self, points: Points):
        self.points = points

    def init(self, model: HistoryDiT, x_T: Tensor, cond: Condition) -> Progress:
        return Progress(x_T, EMPTY)

    def step(self, model: HistoryDiT, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition, state: Progress,
             noise: Noise | None) -> tuple[Tensor, Tensor, Progress]:  # fmt: skip
        time = self.points.times[state.cache.states].to(x_t.device).expand(len(x_t), 1)
        cond = cond.told(**self.points.told(len(x_t), x_t.device))
        output, cache = model(self.points.network_input(x_t.unsqueeze(1), state.x_T), time, cond, state.cache)
        answer = self.points.answer(output[:, 0, : x_t.shape[1]], x_t, t, s)
        x_s = self.points.following(answer, state.x_T, s)
        return x_s, self.points.x_0(answer, x_t, t, s), Progress(state.x_T, cache)


class TrajectoryDistillation(Method):
    """A student that regresses the next point of the teacher's trajectory."""

    sources = frozenset({"trajectory"})

    def __init__(self, config: DistillationConfig, teacher: Guided | None, task: Problem, num_steps: int, total_steps: int):
        assert teacher is not None
        history_layers, visible = self.history(config)
        self.config, self.teacher_network = config, teacher.denoiser.network if task.network_teacher else None
        network = HistoryDiT(
            num_steps, history_layers, visible, config.heads == "per_step",
            extra_channels=task.shape[0] if config.noise_channels else 0, scalars=("step_size",) if config.step_counts else (),
            **task.network_options,
        )  # fmt: skip
        if self.teacher_network is not None:
            network.load_teacher(self.teacher_network.state_dict())
        updates = total_steps if config.dmd_from is None else MatchingStage.student_updates(config, total_steps)
        self.players = {"student": config.player(network, updates)}
        ema = self.players["student"].ema
        assert ema is not None
        self.student = ema.module
        self.levels = few_step_levels(num_steps)
        self.points = Points(config, task.schedule, task.prediction_type, self.levels)
        self.trained_points = [replace(self.points, levels=few_step_levels(n)) for n in config.step_counts] or [self.points]
        self.solver = CachedSteps(self.points)
        self.stage: Stage | None = None
        if config.gan_from is not None:
            self.stage = Adversary(config, teacher, task, network.head(num_steps - 1).linear, total_steps)
        elif config.dmd_from is not None:
            self.stage = MatchingStage(config, teacher, task, total_steps)
        if self.stage is not None:
            self.players[self.stage.name] = self.stage.player
            self.sources = self.sources | {"data"}

    @staticmethod
    def history(config: Any) -> tuple[int, Visible]:
        """How many of the lowest layers see earlier states, and which."""
        return 0, causal

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        for count in (num_steps, *config.step_counts):
            if task.trajectory_steps % count:
                divisors = [n for n in range(1, task.trajectory_steps + 1) if task.trajectory_steps % n == 0]
                raise UsageError(
                    f"{'num_steps' if count == num_steps else 'step_counts'} is {count}, but must divide the {task.trajectory_steps} "
                    f"evaluations of the task's trajectories: one of {', '.join(map(str, divisors))}"
                )
        config.check_options(task, num_steps)
        depth = task.network_options["depth"]
        if (layers := cls.history(config)[0]) > depth:
            raise UsageError(f"history_layers is {layers}, but the teacher has {depth} layers: give 0 to {depth}")

    def teacher_points(self, trajectory: Trajectory) -> Tensor:
        x, target = self.points.inputs_and_targets(trajectory)
        return torch.cat([x, target[:, -1:]], 1)

    def untrained(self) -> Callable[[Tensor, Condition], Tensor] | None:
        """Under the teacher's parametrisation and shared heads the unguided teacher under DDIM, as long as no history is seen."""
        alone = len(self.levels) == 2 or self.history(self.config)[0] == 0
        if self.teacher_network is None or self.config.parametrization != "teacher" or not alone:
            return None
        teacher = Denoiser(self.teacher_network, self.points.schedule, self.points.prediction_type)
        return lambda x_T, cond: integrate(DDIM(), teacher, x_T, self.levels, cond)  # type: ignore[return-value]

    def updates(self, step: int) -> Iterable[Update]:
        points = self.trained_points[step % len(self.trained_points)]
        loss = partial(self.loss, points=points)
        in_stage = self.stage is not None and step >= self.stage.start
        found = self.stage.updates(step, loss) if in_stage else [Update("student", loss)]  # type: ignore[union-attr]
        if self.config.step_counts:
            return [replace(update, phase=f"{update.phase} {len(points.levels) - 1} steps".lstrip()) for update in found]
        return found

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
        """Mean of the S squared errors, under teacher forcing but for the share that sees its own history."""
        assert batch.trajectory is not None
        points, path = points or self.points, batch.trajectory
        x, target = points.inputs_and_targets(path)
        if self.config.own_history:
            own = (batch.uniform("own history") < self.config.own_history).reshape(-1, 1, 1, 1, 1)
            x = torch.where(own, self.own_points(points, x[:, 0], path.cond), x)
        times = points.times.to(x.device).expand(x.shape[:2])
        seen, cond = points.network_input(x, x[:, 0]), path.cond.told(**points.told(len(x), x.device))
        output, _ = self.players["student"].module(seen, times, cond)
        t, s = (grid.repeat(len(x)) for grid in (points.levels[:-1], points.levels[1:]))
        answer = points.answer(output[:, :, : x.shape[2]].flatten(0, 1), x.flatten(0, 1), t, s).unflatten(0, x.shape[:2])
        errors = (answer - target).square().mean((0, 2, 3, 4))
        batch.carry["x_0"] = answer[:, -1]  # at t = 0 the answer is x_0, whatever it was before
        return errors.mean(), {f"mse_step{i + 1}": error.detach() for i, error in enumerate(errors)}

    @torch.no_grad()
    def own_points(self, points: Points, x_T: Tensor, cond: Condition) -> Tensor:
        """Where the student's own sampling goes from x_T [B, C, H, W], without the end: [B, S, C, H, W]."""
        path = integrate(CachedSteps(points), self.players["student"].module, x_T, points.levels, cond, save=True)
        assert isinstance(path, Trajectory)
        return path.states[:, :-1]


@METHODS.register("step-distillation")
class StepDistillation(TrajectoryDistillation):
    """Every step sees its own state alone."""

    Config = DistillationConfig
    reference: ClassVar = "Kim et al. 2025, arXiv 2504.11295, sec. 3.1 and table 1 (its baseline)"

    @classmethod
    def canonical(cls, config: Any, num_steps: int) -> tuple[str, Any]:
        if (
            num_steps == 1 and not config.step_counts
        ):  # from the noise to the data: one head, one time, and all kinds of trajectory are the same pair
            kind = {"trajectory": "predictions", "heads": "per_step"} if config.parametrization == "direct" else {"heads": "shared"}
            config = config.model_copy(update={**kind, "time_embedding": "per_state", "own_history": 0.0})
        return METHODS.name_of(cls), config.without_idle_stages()
