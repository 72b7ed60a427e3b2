"""A task's YAML file, typed: everything that a benchmark fixes except the method."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from harness.diffusion.schedules import schedule_of
from harness.networks.backbones import check, sizes_of
from harness.records import Name

Count = Annotated[int, Field(ge=1, le=10**9)]
"""A number of things."""
Side = Annotated[int, Field(ge=1, le=2**14)]
"""A number of pixels or latents along an axis, or of channels."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What random numbers follow from."""
Part = Literal["teacher", "features"]
"""A network that comes with a task."""


class _Spec(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )
    added: ClassVar[frozenset[str]] = frozenset()
    """Fields that the first tasks did not have. A digest leaves them out at their defaults."""

    @model_serializer(mode="wrap")
    def _without_added_defaults(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        defaults = {name: type(self).model_fields[name].default for name in self.added}
        plain = {name for name, value in defaults.items() if getattr(self, name) == value}
        return {name: value for name, value in whole(self).items() if name not in plain}


class Training(_Spec):
    """How a shipped network was trained."""

    steps: Annotated[int, Field(ge=1, le=5 * 10**8)]
    batch_size: Annotated[int, Field(ge=1, le=2**20)]
    seed: Seed
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the losses' forward passes."""
    compile: bool = False
    """Whether the network goes through torch.compile."""
    options: dict[str, Any] = {}
    """Options of the training method that differ from its defaults."""


class Weights(_Spec):
    """A file of weights; the card (`.yaml`) of one that was trained here lies beside it."""

    file: str
    """Path of the safetensors file, relative to the folder of the task."""
    sha256: str | None = None
    """SHA-256 of the file. None takes the file as it is found, and records state its SHA-256; with
    `training`, none means that `harness teacher train` has not made it yet."""
    training: Training | None = None
    """How it was trained here; none if it comes from others."""


class File(_Spec):
    """A large file, or a folder, that does not ship."""

    file: str
    """Its path, relative to the folder of the task or to the data folder (`--data-dir`)."""
    sha256: str | None = None
    """SHA-256 of the file. None takes it as it is found, and records state its SHA-256."""


INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of torch-fidelity's file of Inception weights."""


class ClassifierFeatures(Weights):
    """The task's own classifier, whose penultimate layer is the feature space."""

    added = frozenset({"kind"})

    kind: Literal["classifier"] = "classifier"


class DetectorFeatures(ClassifierFeatures):
    """The task's own detector: it judges whether prompts are followed, and has features too."""

    kind: Literal["detector"]  # type: ignore[assignment]


class InceptionFeatures(_Spec):
    """Inception-v3 in torch-fidelity's form of the TensorFlow weights, as papers use it."""

    kind: Literal["inception"]
    file: str | None = None
    """File of weights as in `File`; none is torch's hub folder, below $TORCH_HOME."""
    sha256: str = INCEPTION_SHA256
    """SHA-256 of the file, which is checked before it is read."""


class DINOv2Features(File):
    """A DINOv2 vision transformer, whose size follows from its weights."""

    kind: Literal["dinov2"]


def _kind(features: Any) -> str:
    """The kind of a feature network; a file without one is a classifier."""
    if isinstance(features, dict):
        return str(features.get("kind", "classifier"))
    return str(getattr(features, "kind", "classifier"))


Features = Annotated[
    Annotated[ClassifierFeatures, Tag("classifier")]
    | Annotated[DetectorFeatures, Tag("detector")]
    | Annotated[InceptionFeatures, Tag("inception")]
    | Annotated[DINOv2Features, Tag("dinov2")],
    Discriminator(_kind),
]
"""The network whose features judge samples."""


class AutoencoderSpec(_Spec):
    """An autoencoder of diffusers, which makes the latents that the task is about."""

    folder: str
    """Folder with `config.json` and the weights, found like a `File`."""
    sha256: str | None = None
    """SHA-256 of its `diffusion_pytorch_model.safetensors`. None takes it as it is found, and
    records state its SHA-256."""
    scaling: float
    """A latent is (z - shift) x scaling for the encoder's z: 0.18215 for Stable Diffusion's, and 1
    for Qwen-Image's, whose config scales each channel."""
    shift: float = 0.0


class Guidance(_Spec):
    """The guidance of the teacher, in every table of the task."""

    added = frozenset({"norm_patch"})

    scale: float
    channels: int | None = None
    """Leading channels that are guided; none means all."""
    norm_patch: int | None = Field(None, gt=0)
    """Side of the squares of latents whose norm stays that without guidance: 2 for Qwen-Image."""


class DataSpec(_Spec):
    """Where the images of a task are."""

    added = frozenset({"path", "flip", "classes", "held_out"})
    set: str
    """A named set, or the kind of files in `path`: folder, webdataset, npz or latents."""
    split_seed: Seed
    """Draws the held-out part of a set that has none of its own."""
    shape: tuple[Side, Side, Side]
    """C, H and W; pictures are cropped to H = W as ADM does."""
    num_classes: Annotated[int, Field(ge=1, le=10**7)]
    path: str | None = None
    """A file or folder; absolute, or relative to the task's file or to --data-dir."""
    flip: bool = False
    """Whether training mirrors half of the images, each step anew."""
    classes: tuple[str, ...] = ()
    """Names of classes in the order of their labels; empty means all subfolders, sorted."""
    held_out: float | str | None = None
    """A share of each class, or a path. None means the set's own held-out part, a folder val, test
    or held_out beside train, or 0.2."""


class PromptSpec(_Spec):
    """A text encoder's outputs for the task's prompts; a sample's label is its prompt's number."""

    added = frozenset({"length"})

    file: str
    """A safetensors file with `table` [count, length, width] and `null` [1, length, width], the
    embedding of no prompt, as `harness data prompts` writes it."""
    sha256: str | None = None
    """SHA-256 of the file. None takes it as it is found, and records state its SHA-256."""
    length: int | None = None
    """Tokens of each prompt in the file, by which costs are counted while it is missing."""


class EncoderSpec(Weights):
    """A text encoder that is trained with the teacher and then stays as it is."""

    width: Side
    """Width of its outputs, the `text_width` of the network."""
    depth: Annotated[int, Field(ge=1, le=1000)]
    num_heads: Side


class WrittenPrompts(_Spec):
    """Prompts of a grammar, which the task's own encoder reads."""

    set: Literal["scenes"]
    """The grammar."""
    encoder: EncoderSpec


class MixtureSpec(_Spec):
    """A Gaussian mixture that takes the place of real images and of a trained teacher."""

    seed: Seed
    components: Annotated[int, Field(ge=1, le=10**4)]
    """Gaussians of each class."""
    spread: float
    """Standard deviation of their means."""
    stds: tuple[float, float]
    """Interval of their standard deviations."""
    train: Annotated[int, Field(ge=1, le=10**8)]
    held_out: Annotated[int, Field(ge=1, le=10**8)]
    """Samples that stand for real images."""


class TrajectorySpec(_Spec):
    """The teacher's stored trajectories."""

    added = frozenset({"dtype", "precision", "compile"})
    solver: str
    steps: Annotated[int, Field(ge=1, le=1000)]
    count: Count
    seed: Seed
    """Seed of the noise; a run adds its own seed."""
    grid: Literal["few-step", "respaced"] = "few-step"
    """Levels: those of few-step samplers, or DiT's respacing, which ends at level 0."""
    dtype: Literal["float32", "float16"] = "float32"
    """How numbers are stored; float16 halves the disk, and the store's manifest states its error.
    """
    precision: Literal["fp32", "bf16"] = "fp32"
    """The type that the teacher's layers compute in."""
    compile: bool = False
    """Whether the teacher goes through torch.compile, block by block."""


class EvaluationSpec(_Spec):
    added = frozenset({"labels", "rounding", "half_distances", "reference_npz"})

    samples: Annotated[int, Field(ge=2, le=10**8)]
    """N, generated in each noise set."""
    noise_sets: Annotated[int, Field(ge=1, le=1000)]
    """Number of disjoint sets of evaluation noise."""
    seed: Seed
    kid_subset_size: Annotated[int, Field(ge=0, le=10**6)]
    batch_size: Annotated[int, Field(ge=1, le=2**20)]
    latency_batch: Annotated[int, Field(ge=1, le=2**20)]
    neighbours: int | None = Field(None, gt=5)
    """First reference images that precision, recall, density and coverage use; None is all."""
    milestone_samples: int | None = Field(None, gt=1)
    """First samples of noise set 0 on which quality is measured along training; None is all."""
    labels: Literal["balanced", "drawn"] = "balanced"
    """Labels of the samples: each equally often, or drawn uniformly at random."""
    rounding: Literal["round", "floor"] = "round"
    """Formula of 8 bits, clamped to 0..255: round(127.5 (x + 1)), or DiT's floor(127.5 x + 128)."""
    half_distances: bool = False
    """Whether precision and recall use ADM's distances in float16 instead of float64."""
    reference_npz: File | None = None
    """ADM's file of reference images (`arr_0`) or statistics (`mu`, `sigma`, `mu_s`, `sigma_s`),
    which takes the place of the training images."""


class Reference(_Spec):
    """The run beside which every row stands; students are compared with its samples."""

    method: str
    num_steps: Annotated[int, Field(ge=1, le=1000)]
    options: dict[str, Any] = {}


class Budget(_Spec):
    """A named budget."""

    steps: Annotated[int, Field(ge=0, le=5 * 10**8)]
    noise_sets: Annotated[int, Field(ge=1, le=1000)]
    """Number of evaluated noise sets."""


class TaskSpec(_Spec):
    """A task's YAML file."""

    added = frozenset({"autoencoder", "sources"})

    name: Name
    version: Count
    """Raised with every change that moves a number."""
    like: str | None = None
    """A shipped task, which supplies the fields that this file leaves out."""
    summary: str
    data: DataSpec
    network: dict[str, Any]
    """The teacher's network: arguments of our DiT, in which `size: DiT-XL/2` stands for depth,
    width, heads and patch; or `backbone: diffusers` with `class` and `config`."""
    schedule: str
    """`vp`, `flow`, or `flow-3` for a flow whose levels are shifted by 3."""
    prediction_type: Literal["eps", "x_0", "v"]
    teacher: Weights | None
    """The trained teacher; none if it is exact."""
    guidance: Guidance
    guidance_scan: list[float]
    """Scales that teacher training tries; `guidance.scale` should have the best FID."""
    guidance_scan_samples: int | None = None
    """First samples of noise set 0 that the scan uses; none is all. FIDs of fewer samples do not
    compare with those of tables."""
    features: Features | None
    """The feature network; none if the exact distribution judges samples, or nothing does."""
    autoencoder: AutoencoderSpec | None = None
    """What decodes samples to images before they are judged or drawn, where they are latents."""
    mixture: MixtureSpec | None = None
    prompts: PromptSpec | WrittenPrompts | None = None
    trajectories: TrajectorySpec
    evaluation: EvaluationSpec
    reference: Reference
    batch_size: Annotated[int, Field(ge=1, le=2**20)]
    """Samples per training step of a distillation run."""
    budgets: dict[str, Budget]
    sources: dict[str, str] = {}
    """Where files that do not ship come from, by what they are: teacher, features, data,
    prompts, autoencoder or reference. `--dry-run` says it of those that are missing."""
    defaults: dict[str, dict[str, Any]] = {}
    """Default options on this task, by method: results of a search, or values that suit the
    networks."""

    @model_validator(mode="after")
    def _noise_is_predicted_where_data_is_left(self) -> TaskSpec:
        alpha, _ = schedule_of(self.schedule).alpha_sigma(torch.ones((), dtype=torch.float64))
        if self.prediction_type == "eps" and float(alpha) == 0:
            raise ValueError(
                f"prediction_type is eps, but under schedule {self.schedule} "
                "nothing of x_0 is left at t = 1: give v"
            )
        return self

    @model_validator(mode="after")
    def _network_fits_data(self) -> TaskSpec:
        """The network has the data's channels, size and classes."""
        check(self.network)
        shape = list(self.data.shape)
        channels, side = sizes_of(self.network)
        sides = side if isinstance(side, list) else [side, side]
        found = [shape[0] if channels is None else channels]
        found += shape[1:] if side is None else sides
        if found != shape:
            raise ValueError(f"network is for {found}, but data.shape is {shape}")
        sizes = self.network.get("config", self.network)
        dit = self.network.get("class") in (None, "DiTTransformer2DModel")
        classes = sizes.get("num_classes", sizes.get("num_embeds_ada_norm", self.data.num_classes))
        if dit and self.prompts is None and classes not in (0, self.data.num_classes):
            raise ValueError(
                f"network has {classes} classes, but data.num_classes is {self.data.num_classes}"
            )
        return self

    @model_validator(mode="after")
    def _scan_within_a_noise_set(self) -> TaskSpec:
        least, most = self.evaluation.kid_subset_size, self.evaluation.samples
        if (
            self.guidance_scan_samples is not None
            and not least <= self.guidance_scan_samples <= most
        ):
            raise ValueError(
                f"guidance_scan_samples is {self.guidance_scan_samples}, "
                f"but must be {least} (KID's subsets) to {most}"
            )
        return self
