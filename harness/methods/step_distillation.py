"""Step distillation: a student regresses the next point of the teacher's trajectory (the baseline of arXiv 2504.11295).

The trajectory is read at S + 1 points, noise first. Training is teacher-forced, one forward over all S states and the mean of
S unweighted squared errors; sampling takes S steps. `TrajectoryDistillation` is written for a student that sees earlier
states, as ARD's does (`ard.py`); here each state is seen alone.

Untrained, under `parametrization: teacher` and `heads: shared` the student is the unguided teacher under S-step DDIM.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.conditions import Condition
from harness.denoiser import Denoiser, Guided, like, predict
from harness.errors import UsageError
from harness.methods.adversarial import Adversary, GANOptions, watch
from harness.methods.base import METHODS, Batch, Method, Problem, Update
from harness.networks.history import EMPTY, Cache, HistoryDiT, Visible, causal
from harness.schedules import Schedule, few_step_levels
from harness.solvers import DDIM, Noise, Solver, Trajectory, ddim_step, integrate
from harness.solvers.ddim import implied_x_0


class DistillationConfig(GANOptions):
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
            extra_channels=task.shape[0] if config.noise_channels else 0, **task.network_options,
        )  # fmt: skip
        if self.teacher_network is not None:
            network.load_teacher(self.teacher_network.state_dict())
        self.players = {"student": config.player(network, total_steps)}
        ema = self.players["student"].ema
        assert ema is not None
        self.student = ema.module
        self.levels = few_step_levels(num_steps)
        self.points = Points(config, task.schedule, task.prediction_type, self.levels)
        self.solver = CachedSteps(self.points)
        self.last_layer = network.head(num_steps - 1).linear
        self.adversary: Adversary | None = None
        if config.gan_from is not None:
            self.adversary = Adversary(config, teacher, task, self.last_layer.weight.shape, total_steps)
            self.players["discriminator"] = self.adversary.player
            self.sources = self.sources | {"data"}

    @staticmethod
    def history(config: Any) -> tuple[int, Visible]:
        """How many of the lowest layers see earlier states, and which."""
        return 0, causal

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        if task.trajectory_steps % num_steps:
            divisors = [n for n in range(1, task.trajectory_steps + 1) if task.trajectory_steps % n == 0]
            raise UsageError(
                f"num_steps is {num_steps}, but must divide the {task.trajectory_steps} evaluations of the task's "
                f"trajectories: one of {', '.join(map(str, divisors))}"
            )
        config.check_gan(task)
        depth = task.network_options["depth"]
        if (layers := cls.history(config)[0]) > depth:
            raise UsageError(f"history_layers is {layers}, but the teacher has {depth} layers: give 0 to {depth}")
        if config.parametrization == "teacher" and config.trajectory != "states":
            raise UsageError("parametrization 'teacher' is a DDIM step between noisy states: give trajectory 'states' with it")

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
        if self.adversary is None or step < self.adversary.start:
            return [Update("student", self.loss)]
        student = Update("student", self.loss) if step < self.adversary.warm else Update("student", self.loss_with_gan, "gan")
        return [student, Update("discriminator", self.adversary.discriminator_loss)]

    def end_step(self, step: int, means: dict[str, float]) -> Collection[str]:
        if self.adversary is not None and step >= self.adversary.start:
            self.adversary.end_step()
        return ()

    def state_dict(self) -> dict[str, Any]:
        return self.adversary.state_dict() if self.adversary else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.adversary:
            self.adversary.load_state_dict(state)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of the S squared errors, under teacher forcing but for the share that sees its own history."""
        assert batch.trajectory is not None
        x, target = self.points.inputs_and_targets(batch.trajectory)
        if self.config.own_history:
            own = (batch.uniform("own history") < self.config.own_history).reshape(-1, 1, 1, 1, 1)
            x = torch.where(own, self.own_points(x[:, 0], batch.trajectory.cond), x)
        times = self.points.times.to(x.device).expand(x.shape[:2])
        seen = self.points.network_input(x, x[:, 0])
        output, _ = self.players["student"].module(seen, times, batch.trajectory.cond)
        t, s = (grid.repeat(len(x)) for grid in (self.levels[:-1], self.levels[1:]))
        answer = self.points.answer(output[:, :, : x.shape[2]].flatten(0, 1), x.flatten(0, 1), t, s).unflatten(0, x.shape[:2])
        errors = (answer - target).square().mean((0, 2, 3, 4))
        batch.carry["x_0"] = answer[:, -1]  # at t = 0 the answer is x_0, whatever it was before
        return errors.mean(), {f"mse_step{i + 1}": error.detach() for i, error in enumerate(errors)}

    @torch.no_grad()
    def own_points(self, x_T: Tensor, cond: Condition) -> Tensor:
        """Where the student's own sampling goes from x_T [B, C, H, W], without the end: [B, S, C, H, W]."""
        path = integrate(self.solver, self.players["student"].module, x_T, self.levels, cond, save=True)
        assert isinstance(path, Trajectory)
        return path.states[:, :-1]

    def loss_with_gan(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The same, and the GAN's loss of the last x_0."""
        assert self.adversary is not None
        assert batch.trajectory is not None
        with watch(self.last_layer) as seen:
            mse, metrics = self.loss(batch)
        loss, more = self.adversary.student_loss(mse, batch.carry["x_0"], batch.trajectory.cond, batch, seen)
        return loss, metrics | more


@METHODS.register("step-distillation")
class StepDistillation(TrajectoryDistillation):
    """Every step sees its own state alone."""

    Config = DistillationConfig
    reference: ClassVar = "Kim et al. 2025, arXiv 2504.11295, sec. 3.1 and table 1 (its baseline)"

    @classmethod
    def canonical(cls, config: Any, num_steps: int) -> tuple[str, Any]:
        if num_steps == 1:  # from the noise to the data: one head, one time, and all kinds of trajectory are the same pair
            kind = {"trajectory": "predictions", "heads": "per_step"} if config.parametrization == "direct" else {"heads": "shared"}
            config = config.model_copy(update={**kind, "time_embedding": "per_state", "own_history": 0.0})
        return METHODS.name_of(cls), config.without_idle_gan()
