"""Feature spaces: what turns a task's samples into the inputs of metrics.

A space is the task's own classifier, or a published network (Inception, DINOv2). Each knows its
reference: the training images, or ADM's file. The exact task, and latents that nothing decodes and
no classifier judges, have none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import ranks
from harness.data.cache import cached_samples
from harness.data.images import ImageSet
from harness.data.pictures import Pictures
from harness.data.readers import Images
from harness.errors import UsageError
from harness.files import room_for, tensors_digest
from harness.metrics.base import Features
from harness.metrics.described import (
    MANY,
    Description,
    Drawn,
    ReferenceFile,
    as_they_are,
    cached_description,
    describe,
)
from harness.metrics.extractors import DINOv2, Extractor, Inception
from harness.metrics.features import classify
from harness.metrics.fidelity import feature_moments
from harness.metrics.following import Thing, things
from harness.metrics.pixels import AT_ONCE, Pixels, decoding_of, rounding_name, rounding_of
from harness.progress import Progress
from harness.provenance import code_digest
from harness.tasks import Task
from harness.tasks.spec import DetectorFeatures, DINOv2Features, InceptionFeatures

Report = Callable[[str], Progress | None]
OF_REFERENCE = "features of the reference"
FEW = 10_000
"""Sets of fewer images bypass the cache of a classifier's features, which are quick to compute."""


def numeric_mode(device: torch.device) -> dict[str, Any]:
    """The part of a metric's identity that names the arithmetic of a device.

    Its kind, and whether TF32 rounds the products of matrices or of convolutions.
    """
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    tf32 = device.type == "cuda" and any(backend.allow_tf32 for backend in backends)
    return {"device": device.type, "tf32": tf32}


class Space(ABC):
    """A feature space of a task, with its reference."""

    def __init__(self, task: Task, device: torch.device):
        self.task, self.device = task, device

    @abstractmethod
    def of_samples(self, samples: Tensor, keep: bool) -> dict[str, Any]:
        """Inputs of metrics that follow from samples [n, C, H, W], by name.

        Args:
            keep: whether what is computed goes to the cache.
        """

    @abstractmethod
    def of_pictures(self, pictures: Pictures) -> dict[str, Any]:
        """The same for pictures on disk."""

    @property
    @abstractmethod
    def reference(self) -> Any:
        """Features of the reference, or what a published network says of it."""

    @property
    @abstractmethod
    def reference_size(self) -> int:
        """Vectors of the reference; 0 where only moments are known."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the space adds to the identity of its metrics."""
        return {}


class OwnSpace(Space):
    """The task's own classifier."""

    def __init__(self, task: Task, device: torch.device):
        super().__init__(task, device)
        self.classifier: Any = task.classifier(device)
        self.rounded = rounding_of(task)

    def classify(self, samples: Images) -> tuple[Tensor, Tensor]:
        return classify(self.classifier, samples, rounded=self.rounded)

    @cached_property
    def reference(self) -> Tensor:
        """Features of the reference, float64 [m, d], kept in the cache if there are many."""
        images = self.task.split.reference.images
        if len(images) < FEW:
            return self.classify(images)[0]
        key = {
            **self.task.hashes,
            "rounding": rounding_name(self.task),
            **numeric_mode(self.device),
            "code": code_digest("metrics"),
        }
        return cached_samples(key, lambda: self.classify(images)[0])

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        return feature_moments(self.reference)

    @property
    def reference_size(self) -> int:
        return len(self.task.split.reference)

    def of_samples(self, samples: Tensor, keep: bool) -> dict[str, Any]:
        generated, logits = self.classify(samples)
        spec = self.task.spec.evaluation
        found = Features(
            generated,
            self.reference,
            feature_moments(generated),
            self._moments,
            spec.neighbours,
            spec.half_distances,
        )
        known = {"features": found, "real": self.task.split.reference}
        return {**known, "logits": logits} if logits.shape[1] else known

    def of_pictures(self, pictures: Pictures) -> dict[str, Any]:
        if pictures.shape != self.task.shape:
            raise UsageError(
                f"{pictures.path} holds pictures of {list(pictures.shape)}, but the classifier "
                f"of task {self.task.spec.name} sees {list(self.task.shape)} alone"
            )
        samples, start = room_for((len(pictures), *pictures.shape)), 0
        for part in pictures.batches(MANY * AT_ONCE):
            samples[start : start + len(part)] = part.float() / 127.5 - 1
            start += len(part)
        return {"images": samples, **self.of_samples(samples, keep=False)}


class JudgeSpace(OwnSpace):
    """The task's own detector."""

    @torch.no_grad()
    def classify(self, samples: Images) -> tuple[Tensor, Tensor]:
        """Features of samples, float64 [n, 96], and no logits."""

        def features(part: Tensor) -> Tensor:
            return self.classifier.features(self._seen(part)).double().cpu()

        found = list(ranks.each(features, samples.split(MANY * AT_ONCE)))
        return torch.cat(found), torch.empty(len(samples), 0)

    def _seen(self, samples: Tensor) -> Tensor:
        assert self.rounded is not None
        return self.rounded(samples).to(self.device).float() / 127.5 - 1

    def read(self, samples: Tensor) -> list[list[Thing]]:
        """The objects in each sample."""

        def found(part: Tensor) -> list[list[Thing]]:
            return things(self.classifier.find(self._seen(part)))

        return [seen for part in ranks.each(found, samples.split(MANY * AT_ONCE)) for seen in part]

    def of_samples(self, samples: Tensor, keep: bool) -> dict[str, Any]:
        found = super().of_samples(samples, keep)
        return {**found, "seen": self.read(samples)}


class PublishedSpace(Space):
    """A network of the literature on 8-bit pictures; latents are decoded first."""

    def __init__(
        self, task: Task, device: torch.device, extractor: Extractor, report: Report | None = None
    ):
        super().__init__(task, device)
        self._report = report or (lambda stage: None)
        self.extractor, self.pixels = extractor, Pixels(task, device)
        self.file = reference_file(task)

    @property
    def _key(self) -> dict[str, Any]:
        """What decides a description besides the samples and the network.

        The autoencoder's SHA-256 is that of its file, also where the task states none.
        """
        weights = {"autoencoder": self.task.autoencoder_hash} if self.task.spec.autoencoder else {}
        return {
            "rounding": rounding_name(self.task),
            **decoding_of(self.task),
            **weights,
            **numeric_mode(self.device),
            "code": code_digest("metrics"),
        }

    @cached_property
    def reference(self) -> Description:
        """The reference as the network sees it, kept in the cache."""
        key = {**self._key, "reference": self.task.reference_hash}
        if self.file:
            return self.file.description(key, self.extractor, self._report(OF_REFERENCE))
        train = self.task.split.reference
        batches = (part for real in in_parts(train) for part in real.split(AT_ONCE))
        progress = self._report(OF_REFERENCE)
        return cached_description(
            key, self.extractor, batches, len(train), progress=progress, drawn=self.pixels
        )

    @property
    def reference_size(self) -> int:
        if self.file:
            return len(self.file.pictures) if self.file.pictures else 0
        return len(self.task.split.reference)

    @property
    def identity(self) -> dict[str, Any]:
        stated = self.file is not None and self.file.moments is not None
        return {
            **decoding_of(self.task),
            "extractor": f"{self.task.spec.features.kind}: {type(self.extractor).__name__}",  # type: ignore[union-attr]
            "reference_moments": "as stated in the file" if stated else "of the reference images",
        }

    def of_samples(self, samples: Tensor, keep: bool) -> dict[str, Any]:
        batches, n = samples.split(AT_ONCE), len(samples)
        if not keep:
            return self._known(
                describe(self.extractor, batches, n, self._wanted, drawn=self.pixels)
            )
        content = tensors_digest({"samples": samples})
        return self._described(content, batches, n, self.pixels)

    def of_pictures(self, pictures: Pictures) -> dict[str, Any]:
        batches = pictures.batches(MANY * AT_ONCE)
        return self._described(pictures.sha256, batches, len(pictures))

    def _described(
        self, content: str, batches: Iterable[Tensor], n: int, drawn: Drawn = as_they_are
    ) -> dict[str, Any]:
        """The inputs of metrics for pictures with a digest, kept in the cache."""
        key, progress = {**self._key, "samples": content}, self._report("features of samples")
        return self._known(
            cached_description(key, self.extractor, batches, n, self._wanted, progress, drawn)
        )

    @property
    def _wanted(self) -> bool:
        """Whether features of samples have any use, besides their moments."""
        return self.reference.features is not None

    @cached_property
    def _real(self) -> Tensor | None:
        """The reference's features, float64 [m, d], where there are any."""
        return None if self.reference.features is None else self.reference.features.double()

    def _known(self, found: Description) -> dict[str, Any]:
        """The inputs of metrics. Raises UsageError for a reference of other features."""
        reference, spec = self.reference, self.task.spec.evaluation
        if found.moments[0].shape != reference.moments[0].shape:
            raise UsageError(
                f"the reference of task {self.task.spec.name} has moments of "
                f"{len(reference.moments[0])} features, but its network has "
                f"{len(found.moments[0])}"
            )
        features = Features(
            found.features.double() if found.features is not None else None,
            self._real,
            found.moments,
            reference.moments,
            spec.neighbours,
            spec.half_distances,
        )
        known: dict[str, Any] = {"features": features}
        if found.spatial and reference.spatial:
            known["spatial"] = found.spatial, reference.spatial
        if found.score is not None:
            known["split_score"] = found.score
        if self.file is None:
            known["real"] = self.task.split.reference
        return known


def space_of(task: Task, device: torch.device, report: Report | None = None) -> Space | None:
    """The feature space of a task, or None if it has none.

    Args:
        report: from the name of a stage to its progress callback.

    Raises UsageError if the network's weights, the autoencoder or the reference are missing or were
    changed, and for latents before a network that sees 8-bit images.
    """
    spec = task.spec.features
    if task.mixture or spec is None:
        return None
    if task.own_classifier:
        judges = isinstance(spec, DetectorFeatures)
        return JudgeSpace(task, device) if judges else OwnSpace(task, device)
    kinds: dict[type, Callable[..., Extractor]] = {
        InceptionFeatures: Inception,
        DINOv2Features: DINOv2,
    }
    assert isinstance(spec, InceptionFeatures | DINOv2Features)
    file: Path | None = task.located(spec.file) if spec.file else None
    extractor = kinds[type(spec)](file, device, spec.sha256 or "")
    return PublishedSpace(task, device, extractor, report)


def reference_file(task: Task) -> ReferenceFile | None:
    """The reference of a task's YAML, if it has one. Raises UsageError as `ReferenceFile` does."""
    spec = task.spec.evaluation.reference_npz
    return ReferenceFile(task.located(spec.file), spec.sha256) if spec else None


def in_parts(images: ImageSet, size: int = MANY * AT_ONCE) -> Iterator[Tensor]:
    """Real images in order, [B, C, H, W] in [-1, 1] each."""
    for start in range(0, len(images), size):
        yield images.batch(torch.arange(start, min(start + size, len(images))))[0]
