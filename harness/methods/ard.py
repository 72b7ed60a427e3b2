"""Step distillation and ARD, autoregressive distillation (arXiv 2504.11295).

The teacher's trajectory is read at S + 1 points `x_{tau_S} (noise), ..., x_{tau_0} (data)`; the student predicts
`x_hat_{tau_{s-1}} = G(x_{tau_S}, ..., x_{tau_s})` (eq. 4). Training is teacher-forced, one forward over all S states and the
mean of S unweighted squared errors; sampling takes S steps on a key/value cache of the lowest N layers. Step distillation is
N = 0, where each state is seen alone.

Untrained, under `parametrization: teacher` and N = 0 the student is the unguided teacher under S-step DDIM; with N > 0 only
its first step is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from harness.conditions import Condition
from harness.denoiser import Guided, PredictionType, predict
from harness.errors import UsageError
from harness.methods.base import METHODS, Batch, Method, OptimizerConfig, Problem, Update
from harness.networks.history import Cache, HistoryDiT
from harness.schedules import Schedule, few_step_levels
from harness.solvers import Noise, Solver, Trajectory, ddim_step
from harness.solvers.ddim import implied_x_0

PAPER = "Kim et al. 2025, arXiv 2504.11295"


class DistillationConfig(OptimizerConfig):
    """What step distillation and ARD share. The defaults are those of the paper's released code."""

    trajectory: Literal["states", "predictions"] = "predictions"
    """Points of the trajectory: the teacher's noisy states, or its x_0-predictions (the noise itself first)."""
    heads: Literal["shared", "per_step"] = "per_step"
    """One final layer for all steps, or one for each, copied from the teacher's."""
    parametrization: Literal["direct", "teacher"] = "direct"
    """What the output is: the next point itself, or an eps whose DDIM step gives it (needs noisy states)."""


class ARDConfig(DistillationConfig):
    history_layers: int = Field(6, ge=0, json_schema_extra={"in_label": True})
    """How many of the lowest layers see earlier states (the paper's N; 0 is step distillation)."""


class NextState:
    """From the network's output for a state to the next point of the trajectory."""

    def __init__(self, parametrization: str, schedule: Schedule, prediction_type: PredictionType):
        self.parametrization, self.schedule, self.prediction_type = parametrization, schedule, prediction_type

    def __call__(self, output: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """output and x_t [B, C, H, W]; t and s 0-d or [B] -> [B, C, H, W], float32."""
        if self.parametrization == "direct":
            return output.float()
        return ddim_step(predict(output, x_t, t, self.schedule, self.prediction_type), s, self.schedule)


class HistorySolver(Solver):
    """S steps of a history student; the state is its cache.

    Args:
        times: what the time embedding receives at each step, [S], float32.
        next_state: how the output becomes the next point.
        noisy: whether points are noisy states, whose x_0 is implied by two of them, or x_0-predictions themselves.
    """

    def __init__(self, times: Tensor, next_state: NextState, noisy: bool):
        self.times, self.next_state, self.noisy = times, next_state, noisy

    def init(self, model: HistoryDiT, x_T: Tensor, cond: Condition) -> Cache:
        return Cache()

    def step(self, model: HistoryDiT, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition, state: Cache,
             noise: Noise | None) -> tuple[Tensor, Tensor, Cache]:  # fmt: skip
        time = self.times[state.states].to(x_t.device).expand(len(x_t), 1)
        output, state = model(x_t.unsqueeze(1), time, cond.labels, state)
        x_s = self.next_state(output[:, 0, : x_t.shape[1]], x_t, t, s)
        x_0 = implied_x_0(x_t, x_s, t, s, self.next_state.schedule) if self.noisy else x_s
        return x_s, x_0, state


class TrajectoryDistillation(Method):
    """A student that regresses the next point of the teacher's trajectory, seeing `history_layers` layers of history."""

    sources: ClassVar = frozenset({"trajectory"})
    reference: ClassVar = f"{PAPER}, eq. 4 and sec. 3.2; released code for x_0-predictions and per-step heads"

    def __init__(self, config: DistillationConfig, teacher: Guided | None, task: Problem, num_steps: int, total_steps: int):
        assert teacher is not None
        self.num_steps, self.noisy = num_steps, config.trajectory == "states"
        network = HistoryDiT(num_steps, self.history_layers(config), per_step_heads=config.heads == "per_step", **task.network_options)
        network.load_teacher(teacher.denoiser.network.state_dict())
        self.players = {"student": config.player(network, total_steps)}
        ema = self.players["student"].ema
        assert ema is not None
        self.student = ema.module
        self.levels = few_step_levels(num_steps)
        times = self.levels[:-1] if self.noisy else (999 * (1 - torch.arange(num_steps) / num_steps) + 1).double() / 1000
        self.times = task.schedule.network_time(times)
        self.next_state = NextState(config.parametrization, task.schedule, task.prediction_type)
        self.solver = HistorySolver(self.times, self.next_state, self.noisy)

    @staticmethod
    def history_layers(config: Any) -> int:
        """N of a config."""
        return 0

    @classmethod
    def check(cls, config: DistillationConfig, task: Problem, num_steps: int) -> None:
        if task.trajectory_steps % num_steps:
            divisors = [n for n in range(1, task.trajectory_steps + 1) if task.trajectory_steps % n == 0]
            raise UsageError(
                f"num_steps is {num_steps}, but must divide the {task.trajectory_steps} evaluations of the task's "
                f"trajectories: one of {', '.join(map(str, divisors))}"
            )
        depth = task.network_options["depth"]
        if cls.history_layers(config) > depth:
            raise UsageError(f"history_layers is {cls.history_layers(config)}, but the teacher has {depth} layers: give 0 to {depth}")
        if config.parametrization == "teacher" and config.trajectory != "states":
            raise UsageError("parametrization 'teacher' is a DDIM step between noisy states: give trajectory 'states' with it")

    def points(self, trajectory: Trajectory) -> Tensor:
        """The S + 1 points that the student goes through, [B, S + 1, C, H, W], noise first.

        Point i is what j = K i / S teacher evaluations have produced: their state, or the x_0 that the last of them returned.
        """
        every = trajectory.steps // self.num_steps
        if self.noisy:
            return trajectory.states[:, ::every]
        return torch.cat([trajectory.states[:, :1], trajectory.predictions[:, every - 1 :: every]], 1)

    def updates(self, step: int) -> Iterable[Update]:
        return [Update("student", self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of the S squared errors under teacher forcing."""
        assert batch.trajectory is not None
        points = self.points(batch.trajectory)
        x, target = points[:, :-1], points[:, 1:]
        times = self.times.to(x.device).expand(x.shape[:2])
        output, _ = self.players["student"].module(x, times, batch.trajectory.cond.labels)
        t, s = (grid.repeat(len(x)) for grid in (self.levels[:-1], self.levels[1:]))
        next_x = self.next_state(output[:, :, : x.shape[2]].flatten(0, 1), x.flatten(0, 1), t, s)
        errors = (next_x.unflatten(0, x.shape[:2]) - target).square().mean((0, 2, 3, 4))
        return errors.mean(), {f"mse_step{i + 1}": error.detach() for i, error in enumerate(errors)}


@METHODS.register("step-distillation")
class StepDistillation(TrajectoryDistillation):
    """Every step sees its own state alone."""

    Config = DistillationConfig

    @classmethod
    def canonical(cls, config: Any, num_steps: int) -> tuple[str, Any]:
        if num_steps == 1:  # from the noise to the data: one head, and both kinds of trajectory are the same pair
            config = config.model_copy(update={"heads": "shared", "trajectory": "states"})
        return METHODS.name_of(cls), config


@METHODS.register("ard")
class ARD(TrajectoryDistillation):
    """The lowest N layers see all states so far."""

    Config = ARDConfig

    @staticmethod
    def history_layers(config: ARDConfig) -> int:
        return config.history_layers

    @classmethod
    def canonical(cls, config: ARDConfig, num_steps: int) -> tuple[str, Any]:
        if config.history_layers == 0 or num_steps == 1:
            shared = config.model_dump(exclude={"history_layers"})
            return StepDistillation.canonical(DistillationConfig(**shared), num_steps)
        return METHODS.name_of(cls), config
