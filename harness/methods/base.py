"""The contract of a method: the networks it trains, their losses, and the sampler of its student.

The trainer knows this file and no method. For each `Update` it turns `requires_grad` on for that
player alone, calls the loss on each micro-batch, clips, steps and moves the average.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Denoiser, Guided, PredictionType
from harness.diffusion.randomness import Keyed
from harness.diffusion.schedules import Schedule
from harness.errors import UsageError
from harness.methods.parts.options import MethodConfig, Span
from harness.methods.parts.players import Player
from harness.registry import Registry, registry_of
from harness.solvers import Solver, Trajectory


class Problem(Protocol):
    """The properties of a task that a method may use."""

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
        """The description of the teacher's network (`networks.backbones.build`)."""

    @property
    def schedule(self) -> Schedule:
        """The noise schedule."""

    @property
    def prediction_type(self) -> PredictionType:
        """The quantity that the teacher's network predicts."""

    @property
    def data_std(self) -> float:
        """Standard deviation of the data, the papers' sigma_data."""

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the teacher."""

    @property
    def trajectory_steps(self) -> int:
        """K, the number of teacher evaluations in a stored trajectory."""

    @property
    def trajectory_levels(self) -> Tensor:
        """Timesteps of a stored trajectory's states, [K + 1], float64."""

    @property
    def network_teacher(self) -> bool:
        """Whether the teacher is a network with blocks, rather than a closed formula."""

    @property
    def own_classifier(self) -> bool:
        """Whether the task has a classifier of its own, whose features judge samples."""

    def classifier(self, device: torch.device) -> Any:
        """That classifier, frozen: `features` maps images [B, C, H, W] to [B, D]."""


@dataclass
class Batch:
    """One micro-batch.

    Attributes:
        index: sample numbers [B], counted over the whole run.
        data: images [B, C, H, W] in [-1, 1] with their conditions, under the source "data".
        trajectory: the teacher's paths, under the source "trajectory".
        randomness: the keyed generator of this step.
        carry: values that one update leaves for the next of the same micro-batch, within a step.
    """

    index: Tensor
    data: tuple[Tensor, Condition] | None
    trajectory: Trajectory | None
    randomness: Keyed
    carry: dict[str, Any] = field(default_factory=dict)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers [B, *shape], keyed by (seed, step, name, sample number)."""
        return self.randomness.normal(name, self.index, shape)

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform numbers in (0, 1), float64 [B, *shape], keyed in the same way."""
        return self.randomness.uniform(name, self.index, shape)


Loss = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]
"""From a micro-batch to the scalar loss and named scalar metrics."""


@dataclass(frozen=True)
class Update:
    """One optimizer step of one player.

    Attributes:
        player: its name.
        loss: the loss of a micro-batch.
        phase: a name for each loss of a player with its own cost; FLOPs are counted once for each.
    """

    player: str
    loss: Loss
    phase: str = ""


class Method(ABC):
    """A way to obtain a student, or a sampler that needs no training.

    Args:
        config: an instance of the class's `Config`.
        teacher: the guided teacher; None for a method that trains the teacher itself.
        task: the task to solve.
        num_steps: number of steps that the student takes.
        total_steps: length of the run in training steps; every ramp is a fraction of it.

    Attributes:
        players: the trained networks by name; empty for a training-free method.
        student: the network that is sampled, with averaged weights.
        solver, levels: the sampler, as `solvers.sample` takes it.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    sources: frozenset[str] = frozenset()
    """The training data: a subset of {"data", "trajectory"}; empty for a training-free method."""
    target: str = "guided teacher"
    """The student's distribution: "guided teacher", "data", or "guided data" under guidance that
    the method learns from data."""
    init: Literal["teacher", "random"] = "teacher"
    """The student's initial weights."""
    default_num_steps: ClassVar[int] = 4
    """The default number of steps of the student."""
    needs_labels: ClassVar[bool] = False
    """Whether the method needs class labels, which excludes tasks with text."""
    any_step: ClassVar[bool] = False
    """Whether training is independent of num_steps, so that one student serves every number."""
    tunes: ClassVar[dict[str, Span | tuple[Any, ...]]] = {}
    """The options that a fair search varies, with ranges; a tuple lists choices."""
    reference: ClassVar[str] = ""
    """The paper, for `harness describe`."""

    players: dict[str, Player]
    student: nn.Module
    solver: Solver
    levels: Tensor

    @abstractmethod
    def __init__(
        self, config: Any, teacher: Guided | None, task: Problem, num_steps: int, total_steps: int
    ): ...

    @classmethod
    def trained_once(cls, config: Any) -> bool:
        """Whether one training run with these options serves several numbers of steps."""
        return cls.any_step

    @classmethod
    def reads_data(cls, config: Any, total_steps: int) -> bool:
        """Whether a run reads the training images; its identity names them.

        Training does under the source "data". A sampler does if it rests on `Problem.data_std`.
        """
        return bool(total_steps) and "data" in cls.sources

    @classmethod
    def canonical(cls, config: Any, num_steps: int) -> tuple[str, Any]:
        """The method's name and config in canonical form, so that equal models share one run id."""
        return METHODS.name_of(cls), config

    @classmethod
    def check(cls, config: Any, task: Problem, num_steps: int) -> None:
        """Raises UsageError if the options do not suit the task; runs before any computation."""

    @classmethod
    def check_conditions(cls, task: str, prompts: bool) -> None:
        """Raises UsageError if the method needs class labels, but a task of this name has none."""
        if cls.needs_labels and prompts:
            name = METHODS.name_of(cls)
            raise UsageError(f"{name} needs class labels, but task {task} is conditioned on text")

    @classmethod
    def shards(cls, config: Any) -> bool:
        """Whether its networks may be sharded over ranks.

        They may not if the number of a network's passes depends on a rank's samples.
        """
        return True

    @classmethod
    def trajectory_grid(cls, config: Any) -> tuple[str, int] | None:
        """The grid of levels and K of the trajectories to learn from; None for the task's own."""
        return None

    @classmethod
    def output(cls, config: Any, task: Problem) -> str:
        """The meaning of the network's output; `--init-from` needs a student with the same one."""
        return task.prediction_type

    def updates(self, step: int) -> Iterable[Update]:
        """The updates of a step, in order; each is applied before the next loss is called."""
        return ()

    def sums(self) -> Sequence[Tensor]:
        """Sums over a step's samples that `end_step` reads; the trainer adds those of all ranks."""
        return ()

    def end_step(self, step: int, means: dict[str, float]) -> Collection[str]:
        """Moves targets and teachers after a step.

        Returns:
            The players whose optimizer and average start anew.
        """
        return ()

    def state_dict(self) -> dict[str, Any]:
        """The state beyond the players that exact resume needs: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state from `state_dict`."""

    def untrained_sampler(self) -> Callable[[Tensor, Condition], Tensor] | None:
        """A simple function of noise and conditions that equals the untrained student, or None."""
        return None

    @property
    def networks(self) -> list[nn.Module]:
        """The players and their averages; a method with further networks adds these."""
        averages = [player.ema.module for player in self.players.values() if player.ema]
        return [*(player.module for player in self.players.values()), *averages]

    def to(self, device: torch.device) -> None:
        """Moves all networks."""
        for network in self.networks:
            network.to(device)

    @property
    def student_player(self) -> Player:
        """The player whose average is evaluated; every method that trains names it "student"."""
        return self.players["student"]

    def start_from(self, state: dict[str, Tensor]) -> None:
        """Loads another run's student as initial weights. Raises UsageError if they do not fit."""
        player = self.student_player
        try:
            for module in (player.module, *([player.ema.module] if player.ema else [])):
                module.load_state_dict(state)
        except RuntimeError as error:
            raise UsageError(
                "init_from: the student of that run has another network than this one; "
                "give a run with the same options"
            ) from error

    def continue_optimizer(self, state: dict[str, Tensor] | None) -> None:
        """Takes the optimizer's state of the run that `start_from` came from; most start anew.

        Args:
            state: the state by name, as `parts/players.py` writes it; None if the run has none.
        """

    def teacher_points(self, trajectory: Trajectory) -> Tensor:
        """The states that the student's steps should reach, [B, S + 1, C, H, W], noise first."""
        places = torch.searchsorted(-trajectory.levels, -self.levels)
        return trajectory.states[:, places]

    @property
    def sampled_network(self) -> nn.Module:
        """The network whose passes count as NFE."""
        return self.student.network if isinstance(self.student, Denoiser) else self.student


METHODS: Registry[type[Method]] = registry_of("method")
