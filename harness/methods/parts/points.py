"""A student's path along a teacher's trajectory: options, points and cached sampling.

Step distillation and ARD (arXiv 2504.11295) share this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import expand_to, full_precision, on_device, predict
from harness.diffusion.schedules import Schedule, respaced_levels
from harness.errors import UsageError
from harness.methods.base import Problem
from harness.methods.parts.adapters import LoRAOptions
from harness.methods.parts.adversarial import GANOptions
from harness.methods.parts.matching import StageOptions
from harness.methods.parts.options import Numbers
from harness.networks.history import EMPTY, Cache, History
from harness.solvers import Noise, Solver, Trajectory, ddim_step
from harness.solvers.ddim import implied_x_0

PROTOCOLS: dict[str, dict[str, Any]] = {
    "tuned": {},
    "states": {"trajectory": "states", "heads": "per_step", "parametrization": "direct"},
    "released": {"trajectory": "predictions", "heads": "per_step", "parametrization": "direct"},
}
"""What a named protocol stands for; "tuned" leaves the options at what they are."""
RELEASED_GRID = ("respaced", 25)
"""The released code's grid of levels, with K."""
RELEASED_PLACES: tuple[int, ...] = (0, 10, 15, 20, 25)
"""The numbers of evaluations before the released code's points."""


class DistillationConfig(GANOptions, StageOptions, LoRAOptions):
    """Options of step distillation and ARD.

    The defaults are the best recipe found: noisy states, one head, the teacher's parametrisation.
    """

    named: ClassVar = {"protocol": PROTOCOLS}
    protocol: Literal["tuned", "states", "released"] = "tuned"
    """A name for trajectory, heads and parametrization: those given, noisy states predicted
    directly by a head for each step, or the protocol of ARD's released code."""
    lr: float = Field(3e-3, gt=0, le=1)
    """Peak learning rate of AdamW (paper: 1e-4 in runs of 300,000 steps)."""
    trajectory: Literal["states", "predictions", "renoised"] = "states"
    """Points of the trajectory: noisy states, x_0-predictions, or renoised predictions."""
    heads: Literal["shared", "per_step"] = "shared"
    """One final layer for all steps, or one for each; all start as the teacher's."""
    parametrization: Literal["direct", "teacher"] = "teacher"
    """The output: the next point, or the teacher's quantity for a DDIM step (needs states); from
    random weights this quantity is v."""
    grid: Literal["task", "released"] = "task"
    """Points: equally many evaluations of the task's trajectories apart, or after 10, 15, 20 and 25
    evaluations on DiT's respacing, as in the released code (4 steps alone)."""
    time_embedding: Literal["per_state", "constant"] = "per_state"
    """The time input: each state's own time, or the noise's time for all."""
    noise_channels: bool = False
    """Whether every step gets the noise x_T as input channels, with zero weights at first."""
    own_history: float = Field(0.0, ge=0, le=1)
    """Share of a batch with inputs from the student's own sampling; targets do not change."""
    step_counts: Numbers = ()
    """Numbers of steps, as in 1,2,4, that one student trains for in turn; none means num_steps."""

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        """The options that a protocol stands for; the protocol itself becomes "tuned".

        Raises UsageError if another value is given for one of them.
        """
        name = values.get("protocol") if isinstance(values, dict) else None
        if not isinstance(name, str) or name not in PROTOCOLS:
            return values
        meant = PROTOCOLS[name]
        for option, value in meant.items():
            if (given := values.get(option, value)) != value:
                raise UsageError(
                    f"protocol {name!r} means {option} {value!r}, but {option} is {given!r}: "
                    "give one of the two"
                )
        return {**values, **meant, "protocol": "tuned"}

    def check_options(self, task: Problem, num_steps: int) -> None:
        """Raises UsageError for contradictory options."""
        if self.grid == "released" and (num_steps != 4 or self.step_counts):
            raise UsageError(
                "grid 'released' has the points of 4 steps: give num_steps 4 without step_counts, "
                "or grid 'task'"
            )
        if self.parametrization == "teacher" and self.trajectory != "states":
            raise UsageError(
                "parametrization 'teacher' is a DDIM step between noisy states: "
                "give trajectory 'states', or parametrization 'direct'"
            )
        if self.step_counts and num_steps not in self.step_counts:
            counts = ", ".join(map(str, self.step_counts))
            raise UsageError(
                f"num_steps is {num_steps}, "
                f"but step_counts say that the student is trained for {counts}: give one of these"
            )
        if self.step_counts and self.heads == "per_step":
            raise UsageError(
                "step_counts train one student with one final layer for all numbers of steps: "
                "give heads 'shared' with it"
            )
        if self.gan_from is not None and self.dmd_from is not None:
            raise UsageError("gan_from and dmd_from are two ways to finish a student: give one")
        for option in ("gan_from", "dmd_from"):
            if getattr(self, option) is not None and not task.network_teacher:
                raise UsageError(
                    f"{option} needs a teacher that is a network, "
                    "but this task's is a closed formula: leave it out"
                )

    def without_idle_stages(self) -> DistillationConfig:
        """The same with default options for unused stages: equal models have equal configs."""
        idle = [stage for stage in ("gan", "dmd") if getattr(self, f"{stage}_from") is None]
        fields = type(self).model_fields.items()
        return self.model_copy(
            update={name: field.default for name, field in fields if name.split("_")[0] in idle}
        )


@dataclass(frozen=True)
class Points:
    """The S + 1 points of a trajectory that a student visits; point i is at `levels[i]`.

    Point 0 is the noise x_T. Point i is the result of the teacher's first `places[i]` evaluations:
    the noisy state ("states"), the last x_0 ("predictions"), or `alpha x_0 + sigma x_T`
    ("renoised"). They are K i / S of K, or those of the released code.
    """

    config: DistillationConfig
    schedule: Schedule
    prediction_type: Any
    levels: Tensor
    places: tuple[int, ...]

    @classmethod
    def of(cls, config: DistillationConfig, task: Problem, num_steps: int) -> Points:
        """The points of a student that takes `num_steps` steps on a task."""
        if config.grid == "released":
            places, levels = RELEASED_PLACES, respaced_levels(RELEASED_GRID[1])
        else:
            every, levels = task.trajectory_steps // num_steps, task.trajectory_levels
            places = tuple(range(0, task.trajectory_steps + 1, every))
        output = task.prediction_type if task.network_teacher else "v"
        return cls(config, task.schedule, output, levels[list(places)], places)

    def scalars(self, count: int, device: torch.device) -> dict[str, Tensor]:
        """The size of a step [count], an input of a student for several numbers of steps."""
        return (
            {"step_size": torch.full((count,), 1 / (len(self.levels) - 1), device=device)}
            if self.config.step_counts
            else {}
        )

    @property
    def times(self) -> Tensor:
        """Inputs of the time embedding [S]: true levels, or 999 (1 - i / S) for predictions."""
        steps = len(self.levels) - 1
        t = self.levels[:-1]
        if self.config.trajectory == "predictions":
            t = (999 * (1 - torch.arange(steps, dtype=torch.float64) / steps) + 1) / 1000
        if self.config.time_embedding == "constant":
            t = t[:1].expand(steps)
        return self.schedule.network_time(t)

    def inputs_and_targets(self, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        """The student's inputs and targets, [B, S, C, H, W] each."""
        places = torch.tensor(self.places)
        if self.config.trajectory == "states":
            states = trajectory.states[:, places]
            return states[:, :-1], states[:, 1:]
        x_T, targets = trajectory.states[:, :1], trajectory.predictions[:, places[1:] - 1]
        following = [
            self.next_input(targets[:, i], x_T[:, 0], s) for i, s in enumerate(self.levels[1:-1])
        ]
        return torch.cat([x_T, *(x.unsqueeze(1) for x in following)], 1), targets

    def answer(self, output: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The point that an output stands for, [B, C, H, W]; t and s are 0-d or [B]."""
        if self.config.parametrization == "direct":
            return output.to(full_precision(output))
        return ddim_step(
            predict(output, x_t, t, self.schedule, self.prediction_type), s, self.schedule
        )

    def evened(self, off: Tensor) -> Tensor:
        """Differences of answers [B, S, C, H, W], of an eps network's DDIM steps times alpha_t.

        An error of the network moves a DDIM step 1 / alpha_t times as far under eps as under v:
        43 times its size in the first of two steps on DiT's schedule, and 3.4 times in the second.
        """
        if self.config.parametrization == "direct" or self.prediction_type != "eps":
            return off
        alpha = self.schedule.alpha_sigma(self.levels[:-1])[0].to(off)
        return alpha.reshape(1, -1, 1, 1, 1) * off

    def next_input(self, answer: Tensor, x_T: Tensor, s: Tensor) -> Tensor:
        """The next step's input: the answer itself, with noise added again under "renoised"."""
        if self.config.trajectory != "renoised":
            return answer
        alpha, sigma = (expand_to(c, answer) for c in self.schedule.alpha_sigma(s))
        return alpha * answer + sigma * x_T

    def x_0(self, answer: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The x_0 of an answer: itself, or under "states" the x_0 whose DDIM step leads there."""
        return (
            implied_x_0(x_t, answer, t, s, self.schedule)
            if self.config.trajectory == "states"
            else answer
        )

    def network_input(self, x: Tensor, x_T: Tensor) -> Tensor:
        """States [B, S, C, H, W]; `noise_channels` appends the noise [B, C, H, W]."""
        return torch.cat([x, x_T.unsqueeze(1).expand_as(x)], 2) if self.config.noise_channels else x


@dataclass(frozen=True)
class SamplingState:
    """The state of sampling: the noise [B, C, H, W] and the cache of the states so far."""

    x_T: Tensor
    cache: Cache


class CachedSteps(Solver):
    """A student's S steps, each with the cache of the steps before."""

    def __init__(self, points: Points):
        self.points = points

    def init(self, model: History, x_T: Tensor, cond: Condition) -> SamplingState:
        return SamplingState(x_T, EMPTY)

    def step(
        self,
        model: History,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        cond: Condition,
        state: SamplingState,
        noise: Noise | None,
    ) -> tuple[Tensor, Tensor, SamplingState]:
        time = on_device(self.points.times[state.cache.states], x_t.device).expand(len(x_t), 1)
        cond = cond.with_scalars(**self.points.scalars(len(x_t), x_t.device))
        output, cache = model(
            self.points.network_input(x_t.unsqueeze(1), state.x_T), time, cond, state.cache
        )
        answer = self.points.answer(output[:, 0, : x_t.shape[1]], x_t, t, s)
        x_s = self.points.next_input(answer, state.x_T, s)
        return x_s, self.points.x_0(answer, x_t, t, s), SamplingState(state.x_T, cache)
