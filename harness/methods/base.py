"""The contract of a method: what it trains, by which losses, and how its student is sampled.

The trainer knows this file and no method. For each `Update` it turns `requires_grad` on for that player alone, calls the
loss for each micro-batch, clips, steps and moves the EMA.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Denoiser, Guided, PredictionType
from harness.diffusion.randomness import Keyed
from harness.diffusion.schedules import Schedule
from harness.errors import UsageError
from harness.registry import Registry
from harness.solvers import Solver, Trajectory


class Problem(Protocol):
    """What a method may ask of its task."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W] of a sample."""

    @property
    def num_classes(self) -> int:
        """Labels are 0 .. num_classes - 1."""

    @property
    def null(self) -> Condition:
        """The null condition of guidance and label dropout, a batch of one."""

    @property
    def network_options(self) -> dict[str, Any]:
        """Constructor arguments of the teacher's DiT."""

    @property
    def schedule(self) -> Schedule:
        """The noise schedule."""

    @property
    def prediction_type(self) -> PredictionType:
        """What the teacher's network predicts."""

    @property
    def data_std(self) -> float:
        """Standard deviation of the data, sigma_data of the papers."""

    @property
    def guidance_scale(self) -> float:
        """The scale at which the teacher is guided."""

    @property
    def trajectory_steps(self) -> int:
        """K, the number of teacher evaluations in a stored trajectory."""

    @property
    def network_teacher(self) -> bool:
        """Whether the teacher is a DiT, whose weights and blocks a method may use, or a closed formula."""


@dataclass
class Batch:
    """One micro-batch.

    Attributes:
        index: [B], sample numbers, counted over the whole run.
        data: images [B, C, H, W] in [-1, 1] and their conditions, for methods that name the source "data".
        trajectory: for methods that name the source "trajectory".
        randomness: the keyed generator of this step.
        carry: whatever one update leaves for the next one of the same micro-batch; emptied each step.
    """

    index: Tensor
    data: tuple[Tensor, Condition] | None
    trajectory: Trajectory | None
    randomness: Keyed
    carry: dict[str, Any] = field(default_factory=dict)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Standard normal [B, *shape] that depends on (seed, step, name, sample number) alone, on the batch's device."""
        return self.randomness.normal(name, self.index, shape)

    def uniform(self, name: str) -> Tensor:
        """Uniform in (0, 1), float64 [B], keyed as `normal` is."""
        return self.randomness.uniform(name, self.index)


Loss = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]
"""Maps a micro-batch to the scalar loss and named metrics (scalars)."""


class EMA:
    """An exponential moving average of a module's weights: what is evaluated.

    Args:
        module: what is followed; the average starts as a copy of it.
        half_life: steps after which a weight's share has halved, as a fraction of the run.
        total_steps: the length of the run.
    """

    def __init__(self, module: nn.Module, half_life: float, total_steps: int):
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.half_life, self.decay = half_life, 0.5 ** (1 / (half_life * max(total_steps, 1)))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """`average = decay average + (1 - decay) weights`; buffers are copied."""
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - self.decay)
        for mine, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs)

    @property
    def initial_weight(self) -> float:
        """The share of the initial parameters in the average at the end of the run."""
        return 0.5 ** (1 / self.half_life)


Rate = Callable[[float], float]
"""From the fraction of the run that is reached, in (0, 1], to the factor of the learning rate."""


def cosine(warmup: float) -> Rate:
    """Rises linearly over the first part `warmup` of the run, then falls along a cosine to 0."""

    def factor(progress: float) -> float:
        if progress < warmup:
            return progress / warmup
        return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))

    return factor


def constant(progress: float) -> float:
    """Neither rises nor falls."""
    return 1.0


@dataclass
class Player:
    """A network that is trained.

    Attributes:
        module, optimizer: the network and the optimizer of its parameters.
        clip: the norm to which its gradient is clipped, or None.
        ema: its moving average, or None.
        rate: what the learning rate is multiplied by when a fraction of the run, in (0, 1], is reached.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    clip: float | None = 1.0
    ema: EMA | None = None
    rate: Rate = constant


@dataclass(frozen=True)
class Update:
    """One optimizer step of one player.

    Attributes:
        player: its name.
        loss: of a micro-batch.
        phase: tells losses of one player apart that cost differently; FLOPs are counted once a player and phase.
    """

    player: str
    loss: Loss
    phase: str = ""


def _split(value: Any) -> Any:
    parts = value.split(",") if isinstance(value, str) else value
    try:
        return tuple(sorted({int(part) for part in parts}))
    except (TypeError, ValueError):
        return parts  # pydantic says what is wrong


Numbers = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_split)]
"""Whole numbers, typed as 1,2,4: each once, in ascending order."""


class MethodConfig(BaseModel):
    """Options of a method, typed once: command line, YAML and record are made of them.

    A field with `json_schema_extra={"in_label": True}` is named in every table, others where they differ from the default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @property
    def sample_group(self) -> int:
        """How many consecutive samples a loss treats together; batches and micro-batches must be multiples of it."""
        return 1

    @property
    def counted_samples(self) -> int:
        """On how many samples FLOPs are counted: so many that each kind of sample has its share among them."""
        return 8

    @property
    def whole_batch(self) -> bool:
        """Whether a loss must see the whole batch at once, so that there can be no micro-batches."""
        return False

    @property
    def looks_inside(self) -> bool:
        """Whether a loss looks at what happens inside a network that is trained, so that this one cannot be compiled."""
        return False


class OptimizerConfig(MethodConfig):
    """Options that every method which trains by AdamW has. The defaults suit runs of about 1,000 steps on a small task."""

    lr: float = Field(1e-3, gt=0, le=1)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.0, ge=0, le=10)
    """Weight decay of AdamW."""
    clip: float = Field(1.0, gt=0, le=1e6)
    """Norm to which the gradient is clipped."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Fraction of the run over which the learning rate rises."""
    ema_half_life: float = Field(0.05, gt=0, le=1)
    """Half-life of the evaluated weights' average, as a fraction of the run."""

    def player(self, module: nn.Module, total_steps: int) -> Player:
        """A player trained as these options say, with so many optimizer steps."""
        optimizer = torch.optim.AdamW(module.parameters(), self.lr, betas=(0.9, 0.999), weight_decay=self.weight_decay)
        return Player(module, optimizer, self.clip, EMA(module, self.ema_half_life, total_steps), cosine(self.warmup))


class Method(ABC):
    """A way to get a student, or a sampler that needs no training.

    Args:
        config: an instance of the class's `Config`.
        teacher: the guided teacher (None for a method that makes the teacher).
        task: what it is trained for.
        num_steps: how many steps the student takes.
        total_steps: how many training steps the run has; every ramp is a fraction of it.

    Attributes:
        players: the networks that are trained, by name; empty for a training-free method.
        student: what is sampled (its EMA weights).
        solver, levels: how it is sampled, as `integrate` takes them.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    sources: frozenset[str] = frozenset()
    """What it learns from: a subset of {"data", "trajectory"}; empty for a class that never trains."""
    target: str = "guided teacher"
    """The distribution it aims at: "guided teacher" or "data"."""
    init: Literal["teacher", "random"] = "teacher"
    """From which weights the student starts."""
    default_num_steps: ClassVar[int] = 4
    """How many steps the student takes where nothing is said."""
    needs_labels: ClassVar[bool] = False
    """Whether it asks for class labels, so that it cannot be conditioned on text."""
    any_step: ClassVar[bool] = False
    """Whether training does not depend on num_steps, so that one student serves every number of steps."""
    reference: ClassVar[str] = ""
    """The paper, for `harness describe`."""

    players: dict[str, Player]
    student: nn.Module
    solver: Solver
    levels: Tensor

    @abstractmethod
    def __init__(self, config: Any, teacher: Guided | None, task: Problem, num_steps: int, total_steps: int): ...

    @classmethod
    def trained_once(cls, config: Any) -> bool:
        """Whether these options make a student for any number of steps, or for several: one training run serves all of them."""
        return cls.any_step

    @classmethod
    def canonical(cls, config: Any, num_steps: int) -> tuple[str, Any]:
        """The name and config under which an equal model is known, so that equal models share one run id."""
        return METHODS.name_of(cls), config

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        """Raises UsageError if the options do not suit the task; called before anything is computed."""

    @classmethod
    def output(cls, config: Any, task: Problem) -> str:
        """What the output of its network is taken for; a student starts only from one whose output is the same."""
        return task.prediction_type

    def updates(self, step: int) -> Iterable[Update]:
        """The updates of a step, in order; each is applied before the next one's loss is called."""
        return ()

    def end_step(self, step: int, means: dict[str, float]) -> Collection[str]:
        """Moves targets and teachers after a step; returns the players whose optimizer and EMA restart."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """What exact resume needs beyond the players: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""

    def untrained(self) -> Callable[[Tensor, Condition], Tensor] | None:
        """What the untrained student's samples equal, as a function of noise and conditions; None where that is nothing simple."""
        return None

    def to(self, device: torch.device) -> None:
        """Moves all networks that are trained, and their averages; a method with further ones moves them too."""
        for player in self.players.values():
            player.module.to(device)
            if player.ema:
                player.ema.module.to(device)

    @property
    def student_player(self) -> Player:
        """The player whose average is evaluated; every method that trains calls it "student"."""
        return self.players["student"]

    def start_from(self, state: dict[str, Tensor]) -> None:
        """Takes another run's student as initial weights. Raises UsageError if they do not fit."""
        player = self.student_player
        try:
            for module in (player.module, *([player.ema.module] if player.ema else [])):
                module.load_state_dict(state)
        except RuntimeError as error:
            raise UsageError("init_from: that run's student is another network than this one; give a run with the same options") from error

    def teacher_points(self, trajectory: Trajectory) -> Tensor:
        """The points of a teacher's trajectory that the student's steps should meet, [B, S + 1, C, H, W], noise first."""
        steps = len(self.levels) - 1
        return trajectory.states[:, :: trajectory.steps // steps]

    @property
    def passes_through(self) -> nn.Module:
        """The network whose passes are the NFE."""
        return self.student.network if isinstance(self.student, Denoiser) else self.student


METHODS: Registry[Method] = Registry("method")
