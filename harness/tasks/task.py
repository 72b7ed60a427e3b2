"""A task: the data and networks that its file names, loaded on demand and checked by hash."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.data.images import Split
from harness.data.mixture import GaussianMixture
from harness.data.recipe import Recipe
from harness.data.scene_prompts import COLOURS, OBJECTS, WORDS
from harness.data.sets import Wanted, load_split
from harness.diffusion.conditions import Condition, Conditions
from harness.diffusion.denoiser import Denoiser, Guided, PredictionType
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.diffusion.schedules import GRIDS, Schedule, schedule_of
from harness.errors import UsageError
from harness.files import digest, found_hash, read_tensors
from harness.networks.autoencoder import Autoencoder, autoencoder_config, image_shape
from harness.networks.backbones import build
from harness.networks.classifier import Classifier
from harness.networks.detector import Detector
from harness.networks.fit import load_into
from harness.networks.said import check_said
from harness.networks.text import TextEncoder
from harness.solvers import Noise
from harness.tasks.prompts import embedded, from_file, tokens_of, written
from harness.tasks.spec import DetectorFeatures, Part, PromptSpec, TaskSpec, WrittenPrompts
from harness.tasks.task_files import TaskFiles


class Task(TaskFiles):
    """A task with its data and networks; methods see it as a `harness.methods.Problem`.

    Args:
        folder: the first place to look for files; see `TaskFiles`.

    Attributes:
        purpose: the evaluation noise that judges runs: "evaluate", or "tune" for searches.
    """

    purpose = "evaluate"

    def __init__(self, spec: TaskSpec, folder: Path | None = None):
        super().__init__(spec, folder)
        self.shape, self.num_classes = spec.data.shape, spec.data.num_classes
        self.network_options: dict[str, Any] = dict(spec.network)
        self.schedule: Schedule = schedule_of(spec.schedule)
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
        """The conditions that training sees: class labels, or prompts."""
        spec = self.spec.prompts
        if spec is None:
            return Conditions(self.num_classes)
        if isinstance(spec, PromptSpec):
            return from_file(self.path(spec), spec.sha256)
        return self._written(judged=False)

    @cached_property
    def judged_conditions(self) -> Conditions:
        """The conditions of evaluation, which are those of training unless prompts are held out."""
        written = isinstance(self.spec.prompts, WrittenPrompts)
        return self._written(judged=True) if written else self.conditions

    def _written(self, judged: bool) -> Conditions:
        """Prompts of the task's grammar, as the outputs of its encoder."""
        with keyed_initialisation(0, "overwritten by what is loaded"):
            encoder = TextEncoder(**self.encoder_options)
        assert isinstance(self.spec.prompts, WrittenPrompts)
        path, key = self.path(self.spec.prompts.encoder), f"{self.conditions_hash} {judged}"
        state = read_tensors(path, self.spec.prompts.encoder.sha256)
        load_into(encoder, {name: x.float() for name, x in state.items()}, str(path))
        return embedded(tokens_of(written(judged)), encoder.eval(), key)

    @property
    def encoder_options(self) -> dict[str, int]:
        """The arguments of the text encoder. Only tasks with prompts of a grammar have one."""
        assert isinstance(self.spec.prompts, WrittenPrompts)
        encoder = self.spec.prompts.encoder
        sizes = {name: getattr(encoder, name) for name in ("width", "depth", "num_heads")}
        return {"words": len(WORDS), **sizes}

    def untrained(self) -> Task:
        """This task for the training of its teacher: a network with its own encoder reads tokens.

        A task without such an encoder is returned as it is.
        """
        if not isinstance(self.spec.prompts, WrittenPrompts):
            return self
        other = Task(self.spec, self.folder)
        other.network_options = {
            "backbone": "prompted",
            "encoder": self.encoder_options,
            "network": self.network_options,
        }
        other.conditions = tokens_of(written(judged=False))
        other.judged_conditions = tokens_of(written(judged=True))
        return other

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
            self.autoencoder_facts,
        )

    @cached_property
    def split(self) -> Split:
        """Training images (also FID's reference) and held-out ones."""
        split = load_split(self.wanted)
        if self.spec.prompts is None:
            return split
        judged = self.judged_conditions
        return Split(
            replace(split.train, conditions=self.conditions),
            replace(split.held_out, conditions=judged),
            split.apart and replace(split.apart, conditions=judged),
        )

    @cached_property
    def data_hash(self) -> str:
        """SHA-256 of the training images and their labels."""
        return self.split.train.content(rounded=not self.latent)

    @cached_property
    def reference_hash(self) -> str:
        """SHA-256 of the reference: of its file, of a set of its own, or `data_hash`."""
        if file := self.spec.evaluation.reference_npz:
            return file.sha256 or found_hash(self.located(file.file))
        if self.mixture is None and self.split.apart:
            return self.split.apart.content()
        return self.data_hash

    @property
    def latent(self) -> bool:
        """Whether samples are latents: an autoencoder decodes them, or no image has their shape."""
        known = self.spec.autoencoder is not None or self.spec.data.set == "latents"
        return self.mixture is None and (known or self.shape[0] not in (1, 3))

    @cached_property
    def picture_shape(self) -> tuple[int, int, int] | None:
        """Shape [C, H, W] of the images that samples are or are decoded to; None without any.

        Raises UsageError if the autoencoder's folder is missing or does not fit.
        """
        if spec := self.spec.autoencoder:
            return image_shape(autoencoder_config(self.located(spec.folder)), self.shape)
        return None if self.latent or self.mixture is not None else self.shape

    def autoencoder(self, device: torch.device) -> Autoencoder | None:
        """What decodes the task's latents, if it has one.

        Raises UsageError if it is missing or was changed.
        """
        if (spec := self.spec.autoencoder) is None:
            return None
        folder = self.located(spec.folder)
        return Autoencoder(folder, spec.sha256, spec.scaling, spec.shift, device)

    def teacher(self, device: torch.device) -> Guided:
        """The guided teacher from its shipped weights.

        Raises UsageError if the weights are missing or were changed.
        """
        with keyed_initialisation(0, "overwritten by what is loaded"):
            network = build(self.network_options)
        self._load(network, "teacher")
        return self.guided(network.requires_grad_(False).eval().to(device))

    def guided(self, network: nn.Module) -> Guided:
        """A network as this task's teacher."""
        denoiser = Denoiser(network, self.schedule, self.prediction_type)
        guidance = self.spec.guidance
        return Guided(denoiser, guidance.scale, self.null, guidance.channels, guidance.norm_patch)

    def new_classifier(self) -> Classifier | Detector:
        """The feature network with new weights."""
        if isinstance(self.spec.features, DetectorFeatures):
            return Detector(self.shape, len(OBJECTS), len(COLOURS))
        return Classifier(self.shape, self.num_classes)

    def classifier(self, device: torch.device) -> Any:
        """The feature network from its shipped weights: a `Classifier`, or a `Detector`.

        Raises UsageError if the weights are missing or were changed.
        """
        with keyed_initialisation(0, "overwritten by what is loaded"):
            network = self.new_classifier()
        self._load(network, "features")
        return network.requires_grad_(False).eval().to(device)

    @property
    def teacher_identity(self) -> str:
        """SHA-256 of what decides the teacher's outputs: its weights, and how they are read.

        Some weights fit several networks, such as a DiT's by the official rule and by diffusers'.
        For our own networks the weights stand alone, as in stores that exist.
        """
        if self.network_options.keys().isdisjoint(("backbone", "convention")):
            return self.teacher_hash
        return digest({"weights": self.teacher_hash, "network": self.network_options})

    def _load(self, network: nn.Module, part: Part) -> None:
        """Loads a trained network, in float32.

        Raises UsageError if the file is missing, was changed, or does not fit.
        """
        sha256, path = self.made(part), self.path(self.trained(part))
        if not path.is_file():
            raise UsageError(
                f"task {self.spec.name} has no file {path} for its {part}: put it there, or change "
                f"{part}.file in the task"
            )
        state = {name: tensor.float() for name, tensor in read_tensors(path, sha256).items()}
        load_into(network, state, f"{part} of task {self.spec.name} ({path})")
        if part == "teacher":
            spec = self.spec
            check_said(path, spec.network, spec.schedule, spec.prediction_type)

    @property
    def recipe(self) -> Recipe:
        """The recipe of the task's trajectories; a run adds its seed (`Recipe.of_run`)."""
        spec, guidance = self.spec.trajectories, self.spec.guidance
        return Recipe(
            self.teacher_identity,
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
            self.conditions_hash,
            spec.grid,
            spec.dtype,
            guidance.norm_patch,
            spec.precision,
            spec.compile,
        )

    def evaluation_inputs(
        self, noise_set: int, rows: slice = slice(None)
    ) -> tuple[Tensor, Condition]:
        """Noise [N, C, H, W] and conditions [N] that evaluate every run of a purpose.

        Sets are disjoint: set k holds sample numbers k N .. (k + 1) N - 1.

        Args:
            rows: the part of the set that is made.
        """
        index, keyed = self._evaluation_index(noise_set)[rows], self._evaluation_keyed
        cond = self.judged_conditions.of(self._evaluation_numbers(index))
        return keyed.normal("x_T", index, self.shape), cond

    def evaluation_labels(self, noise_set: int) -> Tensor | None:
        """The class labels of `evaluation_inputs`, [N]; None where prompts condition samples."""
        return None if self.spec.prompts else self.evaluation_numbers(noise_set)

    def evaluation_numbers(self, noise_set: int) -> Tensor:
        """The numbers [N] of the conditions of `evaluation_inputs` in `judged_conditions`."""
        return self._evaluation_numbers(self._evaluation_index(noise_set))

    def _evaluation_numbers(self, index: Tensor) -> Tensor:
        """The numbers of samples' conditions: balanced, or drawn uniformly."""
        conditions = self.judged_conditions
        if self.spec.evaluation.labels == "drawn":
            return conditions.drawn_numbers(self._evaluation_keyed, index)
        return index % conditions.count

    def _evaluation_index(self, noise_set: int) -> Tensor:
        count = self.spec.evaluation.samples
        return torch.arange(noise_set * count, (noise_set + 1) * count)

    @property
    def _evaluation_keyed(self) -> Keyed:
        return Keyed(self.purpose, self.spec.evaluation.seed)

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
        index, keyed = self._evaluation_index(noise_set)[rows], self._evaluation_keyed
        return lambda name: keyed.normal(name, index, self.shape)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the task's YAML fixes.

        The summary, the place of the images, the named budgets and the choices of a run are left
        out. Images that only training reads stand in a run's hashes (`runs/identity.py`).
        """
        names = ("summary", "budgets", "like", "defaults", "guidance_scan_samples", "sources")
        free: dict[str, Any] = {**dict.fromkeys(names, True), "data": {"path"}}
        return digest(self.spec.model_dump(mode="json", exclude=free))

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of what a metric's numbers rest on."""
        found = {"teacher": self.teacher_identity, "features": self.features_hash}
        found["reference"] = self.reference_hash
        if self.spec.autoencoder:
            found["autoencoder"] = self.autoencoder_hash
        return found | ({"conditions": self.conditions_hash} if self.spec.prompts else {})
