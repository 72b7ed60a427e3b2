"""The base of most methods: a student that denoises points x_t of data and keyed noise.

Velocities `u = eps - x_0` and flow times `tau = sigma / (alpha + sigma)` are those of the straight
line `x_t / (alpha + sigma)`. So flow matching and its descendants run under any schedule. In these
coordinates DDIM's step is Euler's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Denoiser, Guided, Prediction, expand_to, of_pair
from harness.diffusion.schedules import Schedule, few_step_levels
from harness.errors import UsageError
from harness.methods.base import Batch, Method, Problem, Update
from harness.methods.parts.adapters import LoRAOptions
from harness.methods.parts.players import EMA
from harness.methods.parts.samplers import ConsistencySteps
from harness.networks.backbones import Backbone, build
from harness.solvers import DDIM, sample


class StudentConfig(LoRAOptions):
    init: Literal["teacher", "random"] = "teacher"
    """Initial weights of the student; random ones need long runs."""

    @model_validator(mode="after")
    def _adapters_on_a_teacher(self) -> StudentConfig:
        """Raises UsageError for adapters on random weights."""
        if self.lora_rank is not None and self.init == "random":
            raise UsageError(
                "lora_rank puts adapters on the teacher's weights, but init is 'random': "
                "leave one of them out"
            )
        return self


class DataConfig(StudentConfig):
    """Options of methods that learn from data alone."""

    label_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of samples whose condition becomes the null condition."""


class TimesConfig(StudentConfig):
    """Options of methods whose papers draw times from a normal law."""

    uniform: float = Field(0.3, ge=0, le=1)
    """Share of a batch with uniform timesteps, so that sampling starts at trained levels."""


class HuberConfig(StudentConfig):
    loss: Literal["huber", "l2"] = "huber"
    """Distance: pseudo-Huber `sqrt(|.|^2 + c^2) - c`, c = huber_c sqrt(D); or mean square."""
    huber_c: float = Field(0.00054, gt=0, le=1e3)
    """c of pseudo-Huber for one dimension."""

    def distance(self, off: Tensor) -> Tensor:
        """d of differences [B, ...], as [B]."""
        squared, dimension = off.square().flatten(1).sum(1), off[0].numel()
        if self.loss == "l2":
            return squared / dimension
        c = self.huber_c * dimension**0.5
        return (squared + c**2).sqrt() - c


def sigma_ve(schedule: Schedule, t: Tensor) -> Tensor:
    """sigma / alpha at timesteps t, float64; infinite if alpha is 0."""
    alpha, sigma = schedule.alpha_sigma(t)
    return sigma / alpha


def largest_sigma(schedule: Schedule) -> float:
    """sigma / alpha at t = 1, or 160 if that is infinite."""
    found = float(sigma_ve(schedule, torch.ones((), dtype=torch.float64)))
    return found if found < 1e4 else 160.0


def flow_time(schedule: Schedule, t: Tensor) -> Tensor:
    """`tau = sigma / (alpha + sigma)`, float64: the flow time of the same signal-to-noise ratio."""
    alpha, sigma = schedule.alpha_sigma(t)
    return sigma / (alpha + sigma)


def time_of_flow(schedule: Schedule, tau: Tensor) -> Tensor:
    """The timestep of flow time tau, at most 1: the inverse of `flow_time`."""
    return torch.where(tau < 1, schedule.time_of(tau / (1 - tau).clamp(min=1e-12)), 1.0)


def velocity(prediction: Prediction) -> Tensor:
    """`u = eps - x_0`."""
    return prediction.eps - prediction.x_0


class DenoisingStudent(Method):
    """A network on the task's schedule, trained on real images and keyed noise.

    Args:
        target_half_life: half-life of the target average in steps; None for none.

    Attributes:
        model: the player's network as a denoiser.
        target_ema: the target average, or None.
        target_model: the target average as a denoiser, or the player itself.
    """

    sources = frozenset({"data"})
    scalars: ClassVar[tuple[str, ...]] = ()
    """Names of the student's inputs beside time and condition."""

    @staticmethod
    def student_updates(config: Any, total_steps: int) -> int:
        """The number of optimizer steps over which the student's average runs."""
        return total_steps

    def __init__(
        self,
        config: Any,
        teacher: Guided | None,
        task: Problem,
        num_steps: int,
        total_steps: int,
        target_half_life: float | None = None,
    ):
        assert teacher is not None
        self.config, self.task, self.teacher, self.schedule, self.total_steps = (
            config,
            task,
            teacher,
            task.schedule,
            total_steps,
        )
        self.init = config.init
        network = self.new_network(config, task)
        if task.network_teacher and config.init == "teacher":
            config.start_from_teacher(network, teacher.denoiser.network)
        self.players = {
            "student": config.player(network, self.student_updates(config, total_steps))
        }
        assert self.student_player.ema is not None
        self.student, self.model = (
            self.as_denoiser(self.student_player.ema.module),
            self.as_denoiser(network),
        )
        self.target_ema = (
            EMA(network, target_half_life / max(total_steps, 1), total_steps)
            if target_half_life is not None
            else None
        )
        self.target_model = (
            self.as_denoiser(self.target_ema.module) if self.target_ema else self.model
        )
        self.solver, self.levels = ConsistencySteps(), few_step_levels(num_steps)

    def new_network(self, config: Any, task: Problem) -> Backbone:
        """The student's network with random weights."""
        return build(task.network_options, self.scalars)

    def as_denoiser(self, network: nn.Module) -> Denoiser:
        """A network as a denoiser on the task's schedule.

        From the teacher's weights it has the teacher's prediction type. From random weights it
        predicts v, whose x_0 is well-conditioned at every level.
        """
        output = self.output(self.config, self.task)
        return Denoiser(network, self.task.schedule, output)  # type: ignore[arg-type]

    @classmethod
    def output(cls, config: Any, task: Problem) -> str:
        return task.prediction_type if task.network_teacher and config.init == "teacher" else "v"

    @property
    def starts_as_teacher(self) -> bool:
        """Whether the student starts from the teacher's weights."""
        return self.task.network_teacher and self.config.init == "teacher"

    @property
    def largest_tau(self) -> float:
        """The flow time of pure noise, t = 1."""
        return float(flow_time(self.schedule, torch.ones((), dtype=torch.float64)))

    def untrained_sampler(self) -> Callable[[Tensor, Condition], Tensor] | None:
        """The unguided teacher under DDIM; a stochastic sampler equals it in one step alone."""
        if not self.starts_as_teacher or (self.solver.stochastic and len(self.levels) > 2):
            return None
        return lambda x_T, cond: sample(DDIM(), self.teacher.denoiser, x_T, self.levels, cond)

    def velocity_at(self, model: Denoiser, y: Tensor, tau: Tensor, cond: Condition) -> Tensor:
        """A model's `eps - x_0` at y = (1 - tau) x_0 + tau eps, y [B, C, H, W], tau [B]."""
        t = time_of_flow(self.schedule, tau)
        alpha, sigma = self.schedule.alpha_sigma(t)
        return velocity(model(y * expand_to(alpha + sigma, y), t, cond))

    def noised(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """`alpha_t x_0 + sigma_t eps` at timesteps t [B]."""
        alpha, sigma = (expand_to(c, x_0) for c in self.schedule.alpha_sigma(t))
        return alpha * x_0 + sigma * eps

    def conditioned(self, off: Tensor, t: Tensor) -> Tensor:
        """A difference of x_0, velocities or DDIM steps [B, ...] as a v network would have it.

        An error of the network moves x_0 by sigma / alpha if it predicts eps, and by sigma if it
        predicts v. It moves `eps - x_0` and a DDIM step alpha times less under v too. So the loss
        of an eps network takes alpha_t times the difference: EDM's preconditioning, whose
        gradient is bounded at every level (Karras et al. 2022, arXiv 2206.00364, sec. 5).
        """
        if self.model.prediction_type != "eps":
            return off
        return expand_to(self.schedule.alpha_sigma(t)[0], off) * off

    def with_gradient(self, x: Tensor, t: Tensor) -> Tensor:
        """The same x_0 or jump's end [B, ...], whose gradient is that of a v network."""
        return x.detach() + self.conditioned(x - x.detach(), t)

    def simulated(
        self,
        model: Denoiser,
        levels: Sequence[Tensor] | Tensor,
        cond: Condition,
        batch: Batch,
        name: str,
    ) -> Tensor:
        """A model's x_0 [B, C, H, W] at the last of its steps of consistency sampling.

        Gradients flow through that step alone, as those of a v network.

        Args:
            levels: the falling timesteps of all steps, pure noise first, 0-d or [B] each.
            name: of the keyed noise.
        """
        x_t = batch.normal(f"{name} x_T", self.task.shape)
        with torch.no_grad():
            for i, (t, after) in enumerate(pairwise(levels), 1):
                noise = batch.normal(f"{name} step {i}", self.task.shape)
                x_t = self.noised(model(x_t, t, cond).x_0, noise, after)
        return self.with_gradient(model(x_t, levels[-1], cond).x_0, levels[-1])

    def output_error(self, found: Prediction, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The error of a prediction of the student in the quantity that its network predicts."""
        kind = self.model.prediction_type
        return getattr(found, kind) - getattr(of_pair(x_0, eps, t, self.schedule), kind)

    def with_dropout(self, batch: Batch, cond: Condition) -> Condition:
        """The conditions, of which the share `label_dropout` becomes the null condition."""
        return cond.replaced(self.dropped(batch), self.task.null)

    def dropped(self, batch: Batch) -> Tensor:
        """Which samples have the null condition, [B]."""
        return batch.uniform("dropout") < self.config.label_dropout

    def with_uniform(self, batch: Batch, t: Tensor, name: str = "uniform") -> Tensor:
        """Timesteps t [B], of which the share `uniform` is replaced by uniform ones."""
        replaced = batch.uniform(name) < self.config.uniform
        return torch.where(replaced, 1e-3 + (1 - 1e-3) * batch.uniform(f"{name} t"), t)

    def start_from(self, state: dict[str, Tensor]) -> None:
        super().start_from(state)
        if self.target_ema:
            self.target_ema.module.load_state_dict(state)

    @property
    def networks(self) -> list[nn.Module]:
        return [*super().networks, *([self.target_ema.module] if self.target_ema else [])]

    def updates(self, step: int) -> Iterable[Update]:
        return [Update("student", self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, for methods whose loss is the same at every step."""
        raise NotImplementedError

    def end_step(self, step: int, means: dict[str, float]) -> Collection[str]:
        if self.target_ema:
            self.target_ema.update(self.student_player.module)
        return ()

    def state_dict(self) -> dict[str, Any]:
        return dict(self.target_ema.module.state_dict()) if self.target_ema else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.target_ema:
            self.target_ema.module.load_state_dict(state)
