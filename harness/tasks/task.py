"""A task fixes everything but the method: data and split, teacher, guidance, trajectories, evaluation and features.

`TaskSpec` is the YAML file, typed; `Task` adds the things that it names, loaded when asked for and checked by hash.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator
from torch import Tensor, nn

from harness.data.images import ImageSet, Split, load_split, to_uint8
from harness.data.mixture import ExactNetwork, GaussianMixture
from harness.data.trajectories import Recipe
from harness.diffusion.conditions import Condition, Conditions
from harness.diffusion.denoiser import Denoiser, Guided, PredictionType
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.diffusion.schedules import SCHEDULES, Schedule
from harness.errors import UsageError, unknown
from harness.files import digest, read_tensors, read_yaml, tensors_digest
from harness.networks.classifier import Classifier
from harness.networks.dit import DiT
from harness.solvers import Noise

Part = Literal["teacher", "features"]
"""A network that comes with a task."""

FOLDER = Path(str(files("harness.tasks")))


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Training(_Spec):
    """How a shipped network was trained."""

    steps: int
    batch_size: int
    seed: int
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the losses' forward passes."""
    compile: bool = False
    """Whether the network goes through torch.compile."""
    options: dict[str, Any] = {}
    """Options of the training method that differ from its defaults."""

    @model_serializer(mode="wrap")
    def _said(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What came after the first digests of tasks is written only where it differs from its default, so that those stay."""
        plain = {name: type(self).model_fields[name].default for name in ("precision", "compile")}
        return {name: value for name, value in dump(self).items() if name not in plain or value != plain[name]}


class Weights(_Spec):
    """A shipped file of weights, beside it its card (`.yaml`)."""

    file: str
    """Path of the safetensors file, relative to the folder of the tasks."""
    sha256: str
    """SHA-256 of the file."""
    training: Training


class Guidance(_Spec):
    """The guidance under which the teacher is always asked."""

    scale: float
    channels: int | None = None
    """Leading channels that are guided; none means all."""


class DataSpec(_Spec):
    set: str
    split_seed: int
    shape: tuple[int, int, int]
    num_classes: int


class PromptSpec(_Spec):
    """A text encoder's outputs for the prompts of a task; a sample's label is then the number of its prompt."""

    file: str
    """Path of a safetensors file with `table` [count, length, width] and `null` [1, length, width], the encoder's for no prompt."""
    sha256: str
    """SHA-256 of the file."""


class MixtureSpec(_Spec):
    """A Gaussian mixture in the place of real images and of a trained teacher."""

    seed: int
    components: int
    """Gaussians of each class."""
    spread: float
    """Standard deviation of their means."""
    stds: tuple[float, float]
    """Interval of their standard deviations."""
    train: int
    held_out: int
    """Samples that stand for real images."""


class TrajectorySpec(_Spec):
    solver: str
    steps: int
    count: int
    seed: int


class EvaluationSpec(_Spec):
    samples: int
    """N, generated in each noise set."""
    noise_sets: int
    """How many disjoint sets of evaluation noise there are."""
    seed: int
    kid_subset_size: int
    batch_size: int
    latency_batch: int
    neighbours: int | None = Field(None, gt=5)
    """Reference images, the first so many, that precision, recall, density and coverage see; None is all."""
    milestone_samples: int | None = Field(None, gt=1)
    """Samples, the first so many of noise set 0, on which quality is measured along training; None is all. FID depends on N."""


class Reference(_Spec):
    """The run beside which every row is shown, and whose samples the students' are compared with."""

    method: str
    num_steps: int
    options: dict[str, Any] = {}


class Budget(_Spec):
    """A named budget."""

    steps: int
    noise_sets: int
    """How many noise sets are evaluated."""


class TaskSpec(_Spec):
    """A task's YAML file."""

    name: str
    version: int
    """Raised whenever a number of the task would change."""
    like: str | None = None
    """The task of ours from which all is taken that this file does not say."""
    summary: str
    data: DataSpec
    network: dict[str, int]
    """Constructor arguments of the teacher's DiT; of prompts their `text_width`, and no `num_classes`."""
    schedule: str
    prediction_type: Literal["eps", "x_0", "v"]
    teacher: Weights | None
    """The trained teacher; none where it is exact."""
    guidance: Guidance
    guidance_scan: list[float]
    """Scales that teacher training tries; the best FID should be `guidance.scale`."""
    guidance_scan_samples: int | None = None
    """The first so many samples of noise set 0, on which it tries them; none is all. FID depends on N: the scan's is not a table's."""
    features: Weights | None
    """The feature network; none where samples are judged by the exact distribution."""
    mixture: MixtureSpec | None = None
    prompts: PromptSpec | None = None
    trajectories: TrajectorySpec
    evaluation: EvaluationSpec
    reference: Reference
    batch_size: int
    """Samples a training step of a distillation run."""
    budgets: dict[str, Budget]
    defaults: dict[str, dict[str, Any]] = {}
    """By method, the options that it has on this task if nothing is said: what a search found, or what suits its networks."""

    @model_validator(mode="after")
    def _noise_is_predicted_where_data_is_left(self) -> TaskSpec:
        if self.prediction_type == "eps" and self.schedule in SCHEDULES:
            alpha, _ = SCHEDULES[self.schedule]().alpha_sigma(torch.ones((), dtype=torch.float64))
            if float(alpha) == 0:
                raise ValueError(f"prediction_type is eps, but under schedule {self.schedule} nothing of x_0 is left at t = 1: give v")
        return self

    @model_validator(mode="after")
    def _scan_within_a_noise_set(self) -> TaskSpec:
        least, most = self.evaluation.kid_subset_size, self.evaluation.samples
        if self.guidance_scan_samples is not None and not least <= self.guidance_scan_samples <= most:
            raise ValueError(f"guidance_scan_samples is {self.guidance_scan_samples}, but must be {least} (KID's subsets) to {most}")
        return self


class Task:
    """A task with its data and networks (see `harness.methods.Problem` for what methods use of it).

    Args:
        folder: where files of weights are looked for first; then among ours.
    """

    def __init__(self, spec: TaskSpec, folder: Path | None = None):
        self.spec, self.folder = spec, folder
        self.shape, self.num_classes = spec.data.shape, spec.data.num_classes
        self.network_options: dict[str, Any] = dict(spec.network)
        self.schedule: Schedule = SCHEDULES[spec.schedule]()
        self.prediction_type: PredictionType = spec.prediction_type
        self.guidance_scale = spec.guidance.scale
        self.trajectory_steps = spec.trajectories.steps
        self.network_teacher = spec.teacher is not None

    @property
    def null(self) -> Condition:
        """The null condition."""
        return self.conditions.null

    @cached_property
    def conditions(self) -> Conditions:
        """What samples are conditioned on."""
        spec = self.spec.prompts
        if spec is None:
            return Conditions(self.num_classes)
        found = read_tensors(self.path(spec), spec.sha256)
        return Conditions(len(found["table"]), found["table"].float(), found["null"].float())

    @cached_property
    def data_std(self) -> float:
        """Standard deviation of all numbers in the training images."""
        return float(self.split.train.images.double().std())

    @cached_property
    def split(self) -> Split:
        """Training images (also FID's reference) and held-out ones."""
        split = load_split(self.spec.data.set, self.spec.data.split_seed)
        if self.spec.prompts is None:
            return split
        return Split(*(replace(part, conditions=self.conditions) for part in (split.train, split.held_out)))

    @cached_property
    def reference_hash(self) -> str:
        """SHA-256 of the reference images, rounded to 8 bits, and their labels."""
        train = self.split.train
        return tensors_digest({"images": to_uint8(train.images), "labels": train.labels})

    def teacher(self, device: torch.device) -> Guided:
        """The guided teacher from its shipped weights. Raises UsageError if they are missing or were changed."""
        with keyed_initialisation(0, "overwritten by what is loaded"):
            network = DiT(**self.network_options)
        network.load_state_dict(self._weights(self.trained("teacher")))
        return self.guided(network.requires_grad_(False).eval().to(device))

    def guided(self, network: nn.Module) -> Guided:
        """A network as this task's teacher."""
        denoiser = Denoiser(network, self.schedule, self.prediction_type)
        return Guided(denoiser, self.spec.guidance.scale, self.null, self.spec.guidance.channels)

    def classifier(self, device: torch.device) -> Classifier:
        """The feature network from its shipped weights. Raises UsageError if they are missing or were changed."""
        with keyed_initialisation(0, "overwritten by what is loaded"):
            network = Classifier(self.shape, self.num_classes)
        network.load_state_dict(self._weights(self.trained("features")))
        return network.requires_grad_(False).eval().to(device)

    def trained(self, part: Part) -> Weights:
        """What the task's file says of a trained network. Raises UsageError if the task has none."""
        weights = getattr(self.spec, part)
        if weights is None:
            raise UsageError(f"task {self.spec.name} has no trained {part}: it is exact")
        return weights

    def borrows(self, part: Part) -> bool:
        """Whether a trained network is that of the task that this one is like."""
        return self.spec.like is not None and getattr(load_task(self.spec.like).spec, part) == getattr(self.spec, part)

    @property
    def teacher_hash(self) -> str:
        """SHA-256 of the teacher's weights file."""
        return self.trained("teacher").sha256

    def path(self, weights: Weights | PromptSpec) -> Path:
        """Where a shipped file of weights is; its card has the same name with `.yaml`."""
        own = (self.folder or FOLDER) / weights.file
        return own if own.is_file() else FOLDER / weights.file

    def _weights(self, weights: Weights) -> dict[str, Tensor]:
        state = read_tensors(self.path(weights), weights.sha256)
        return {name: tensor.float() for name, tensor in state.items()}

    @property
    def recipe(self) -> Recipe:
        """What the task's trajectories are made of."""
        spec, guidance = self.spec.trajectories, self.spec.guidance
        return Recipe(self.teacher_hash, self.spec.schedule, self.spec.prediction_type, guidance.scale, guidance.channels,
                      spec.solver, spec.steps, spec.count, spec.seed, self.shape, self.conditions.count,
                      self.spec.prompts.sha256 if self.spec.prompts else "")  # fmt: skip

    def evaluation_inputs(self, noise_set: int) -> tuple[Tensor, Condition]:
        """The noise [N, C, H, W] and balanced labels [N] on which every run of the task is evaluated.

        Sets are disjoint: set k holds sample numbers k N .. (k + 1) N - 1.
        """
        spec = self.spec.evaluation
        index = torch.arange(noise_set * spec.samples, (noise_set + 1) * spec.samples)
        return Keyed("evaluate", spec.seed).normal("x_T", index, self.shape), self.conditions.balanced(index)

    def evaluation_noise(self, noise_set: int, rows: slice) -> Noise:
        """Where a stochastic sampler draws for these rows of `evaluation_inputs`: [B, C, H, W] by name, keyed like x_T."""
        spec = self.spec.evaluation
        index = torch.arange(noise_set * spec.samples, (noise_set + 1) * spec.samples)[rows]
        return lambda name: Keyed("evaluate", spec.seed).normal(name, index, self.shape)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that the task fixes; its summary, the names of budgets and what a run may choose do not count."""
        spoken = {"summary", "budgets", "like", "defaults", "guidance_scan_samples"}
        without = {*spoken, *(part for part in ("mixture", "prompts") if getattr(self.spec, part) is None)}
        content = self.spec.model_dump(mode="json", exclude=without)
        content["evaluation"] = {name: value for name, value in content["evaluation"].items() if value is not None}
        return digest(content)

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of everything that a run's numbers rest on."""
        found = {"teacher": self.teacher_hash, "features": self.trained("features").sha256, "reference": self.reference_hash}
        return found | ({"conditions": self.spec.prompts.sha256} if self.spec.prompts else {})


class MixtureTask(Task):
    """A task whose teacher, density and ODE map are exact."""

    @cached_property
    def mixture(self) -> GaussianMixture:
        """The distribution."""
        spec = self.spec.mixture
        assert spec is not None
        return GaussianMixture.drawn(spec.seed, self.num_classes, spec.components, math.prod(self.shape), spec.spread, spec.stds)

    @cached_property
    def split(self) -> Split:
        """Exact samples, balanced, in the place of real images."""
        spec = self.spec.mixture
        assert spec is not None

        def samples(first: int, count: int) -> ImageSet:
            index = torch.arange(first, first + count)
            labels = self.conditions.balanced(index).classes
            return ImageSet(self.mixture.sample(Keyed("data", spec.seed), index, labels).view(-1, *self.shape), labels)

        return Split(samples(0, spec.train), samples(spec.train, spec.held_out))

    def teacher(self, device: torch.device) -> Guided:
        """The exact denoiser under the task's guidance."""
        return self.guided(ExactNetwork(self.mixture, self.schedule).to(device))

    @cached_property
    def teacher_hash(self) -> str:
        """SHA-256 of all that the exact denoiser is made of."""
        numbers = tensors_digest({"means": self.mixture.means, "stds": self.mixture.stds})
        return digest([numbers, self.spec.schedule, self.spec.prediction_type])

    @property
    def hashes(self) -> dict[str, str]:
        return {"teacher": self.teacher_hash, "features": "the samples themselves", "reference": "exact moments and density"}

    def ode_map(self, noise_set: int) -> Tensor:
        """Where the exact ODE leads from the noise of `evaluation_inputs`, float64 [N, C, H, W]."""
        x_T, cond = self.evaluation_inputs(noise_set)
        return self.mixture.ode_map(x_T.flatten(1), cond.classes, self.schedule).view(-1, *self.shape)


def task_names() -> list[str]:
    """The tasks that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_task(name: str) -> Task:
    """A task by its name, or by the path of a YAML file. Raises UsageError for an unknown one or a broken file."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        if path.parent == FOLDER:
            raise unknown("task", name, task_names())
        raise UsageError(f"there is no task file {path}")
    try:
        spec = TaskSpec.model_validate(_read(path))
    except ValidationError as error:
        raise UsageError(f"task file {path} is broken: {' '.join(str(error).split())}") from error
    return MixtureTask(spec, path.parent) if spec.mixture else Task(spec, path.parent)


def _read(path: Path) -> dict[str, Any]:
    """A task's file; where it says `like: other`, what it does not say is as in that one of ours, but for what was tuned there."""
    content = read_yaml(path)
    return {**_read(FOLDER / f"{content['like']}.yaml"), "defaults": {}, **content} if "like" in content else content
