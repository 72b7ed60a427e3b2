"""A task: the data and networks that its file names, loaded on demand and checked by hash."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.data.images import Split
from harness.data.mixture import GaussianMixture
from harness.data.recipe import Recipe
from harness.data.sets import Wanted, load_split
from harness.diffusion.conditions import Condition, Conditions
from harness.diffusion.denoiser import Denoiser, Guided, PredictionType
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.diffusion.schedules import GRIDS, SCHEDULES, Schedule
from harness.errors import UsageError
from harness.files import digest, read_tensors
from harness.networks.classifier import Classifier
from harness.networks.dit import DiT
from harness.solvers import Noise
from harness.tasks.spec import Part, PromptSpec, TaskSpec, Weights

FOLDER = Path(str(files("harness.tasks")))
"""The folder of the shipped tasks and their weights."""


class Task:
    """A task with its data and networks; methods see it as a `harness.methods.Problem`.

    Args:
        folder: the first place to look for files of weights; the second is the shipped folder.

    Attributes:
        purpose: the evaluation noise that judges runs: "evaluate", or "tune" for searches.
    """

    purpose = "evaluate"

    def __init__(self, spec: TaskSpec, folder: Path | None = None):
        self.spec, self.folder = spec, folder
        self.shape, self.num_classes = spec.data.shape, spec.data.num_classes
        self.network_options: dict[str, Any] = dict(spec.network)
        self.schedule: Schedule = SCHEDULES[spec.schedule]()
        self.prediction_type: PredictionType = spec.prediction_type
        self.guidance_scale = spec.guidance.scale
        self.trajectory_steps = spec.trajectories.steps
        self.network_teacher = spec.teacher is not None
        self.mixture: GaussianMixture | None = None

    def judged_for(self, purpose: str) -> Task:
        """This task with the evaluation noise of a purpose; nothing else differs."""
        if purpose == self.purpose:
            return self
        other = copy(self)
        other.purpose = purpose
        return other

    @property
    def null(self) -> Condition:
        """The null condition."""
        return self.conditions.null

    @property
    def trajectory_levels(self) -> Tensor:
        """Timesteps of a stored trajectory's states, [K + 1], float64."""
        return GRIDS[self.spec.trajectories.grid](self.trajectory_steps)

    @cached_property
    def conditions(self) -> Conditions:
        """The conditions of samples: class labels, or prompts."""
        spec = self.spec.prompts
        if spec is None:
            return Conditions(self.num_classes)
        found = read_tensors(self.path(spec), spec.sha256)
        return Conditions(len(found["table"]), found["table"].float(), found["null"].float())

    @cached_property
    def data_std(self) -> float:
        """Standard deviation of the numbers in the training images."""
        return self.split.train.std

    @property
    def wanted(self) -> Wanted:
        """What the task says about its image set."""
        data = self.spec.data
        return Wanted(
            data.set,
            data.shape,
            data.num_classes,
            data.split_seed,
            data.path,
            self.folder,
            data.held_out,
            data.classes,
            data.flip,
        )

    @cached_property
    def split(self) -> Split:
        """Training images (also FID's reference) and held-out ones."""
        split = load_split(self.wanted)
        if self.spec.prompts is None:
            return split
        return Split(
            *(replace(part, conditions=self.conditions) for part in (split.train, split.held_out))
        )

    @cached_property
    def reference_hash(self) -> str:
        """SHA-256 of the reference images and their labels."""
        return self.split.train.content()

    def teacher(self, device: torch.device) -> Guided:
        """The guided teacher from its shipped weights.

        Raises UsageError if the weights are missing or were changed.
        """
        with keyed_initialisation(0, "overwritten by what is loaded"):
            network = DiT(**self.network_options)
        network.load_state_dict(self._weights(self.trained("teacher")))
        return self.guided(network.requires_grad_(False).eval().to(device))

    def guided(self, network: nn.Module) -> Guided:
        """A network as this task's teacher."""
        denoiser = Denoiser(network, self.schedule, self.prediction_type)
        return Guided(denoiser, self.spec.guidance.scale, self.null, self.spec.guidance.channels)

    def classifier(self, device: torch.device) -> Classifier:
        """The feature network from its shipped weights.

        Raises UsageError if the weights are missing or were changed.
        """
        with keyed_initialisation(0, "overwritten by what is loaded"):
            network = Classifier(self.shape, self.num_classes)
        network.load_state_dict(self._weights(self.trained("features")))
        return network.requires_grad_(False).eval().to(device)

    def trained(self, part: Part) -> Weights:
        """The task's entry for a trained network. Raises UsageError if the task has none."""
        weights = getattr(self.spec, part)
        if weights is None:
            raise UsageError(f"task {self.spec.name} has no trained {part}: it is exact")
        return weights

    @property
    def teacher_hash(self) -> str:
        """SHA-256 of the teacher's weights file."""
        return self.trained("teacher").sha256

    def path(self, weights: Weights | PromptSpec) -> Path:
        """The path of a shipped file of weights; its card has the same name with `.yaml`."""
        own = (self.folder or FOLDER) / weights.file
        return own if own.is_file() else FOLDER / weights.file

    def _weights(self, weights: Weights) -> dict[str, Tensor]:
        state = read_tensors(self.path(weights), weights.sha256)
        return {name: tensor.float() for name, tensor in state.items()}

    @property
    def recipe(self) -> Recipe:
        """The recipe of the task's trajectories; a run adds its seed (`Recipe.of_run`)."""
        spec, guidance = self.spec.trajectories, self.spec.guidance
        return Recipe(
            self.teacher_hash,
            self.spec.schedule,
            self.spec.prediction_type,
            guidance.scale,
            guidance.channels,
            spec.solver,
            spec.steps,
            spec.count,
            spec.seed,
            self.shape,
            self.conditions.count,
            self.spec.prompts.sha256 if self.spec.prompts else "",
            spec.grid,
            spec.dtype,
        )

    def evaluation_inputs(self, noise_set: int) -> tuple[Tensor, Condition]:
        """Noise [N, C, H, W] and balanced conditions [N] that evaluate every run of a purpose.

        Sets are disjoint: set k holds sample numbers k N .. (k + 1) N - 1.
        """
        spec = self.spec.evaluation
        index = torch.arange(noise_set * spec.samples, (noise_set + 1) * spec.samples)
        x_T = Keyed(self.purpose, spec.seed).normal("x_T", index, self.shape)
        return x_T, self.conditions.balanced(index)

    def ode_map(self, noise_set: int) -> Tensor:
        """End points of the exact ODE from a noise set's noise, float64 [N, C, H, W].

        Raises NotImplementedError where the task has no exact ODE map.
        """
        raise NotImplementedError(f"task {self.spec.name} has no exact ODE map")

    def evaluation_noise(self, noise_set: int, rows: slice) -> Noise:
        """Further noise for stochastic samplers, [B, C, H, W] by name.

        Args:
            rows: the rows of `evaluation_inputs` that are sampled.
        """
        spec = self.spec.evaluation
        index = torch.arange(noise_set * spec.samples, (noise_set + 1) * spec.samples)[rows]
        return lambda name: Keyed(self.purpose, spec.seed).normal(name, index, self.shape)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that the task fixes.

        The summary, the place of the images, the named budgets and the choices of a run are left
        out. What the images are stands in `hashes`.
        """
        names = ("summary", "budgets", "like", "defaults", "guidance_scan_samples")
        free: dict[str, Any] = {**dict.fromkeys(names, True), "data": {"path"}}
        return digest(self.spec.model_dump(mode="json", exclude=free))

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of everything on which a run's numbers rest."""
        found = {
            "teacher": self.teacher_hash,
            "features": self.trained("features").sha256,
            "reference": self.reference_hash,
        }
        return found | ({"conditions": self.spec.prompts.sha256} if self.spec.prompts else {})
