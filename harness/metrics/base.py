"""What a metric of samples is. Built-in ones are in `registered.py`; others come from plug-ins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from torch import Tensor

from harness.data.images import ImageSet
from harness.metrics.manifold import density_coverage, precision_recall
from harness.registry import Registry, registry_of

Direction = Literal["lower", "higher", "none"]


@dataclass(frozen=True)
class Judged:
    """Samples beside the reference, as images and in the feature network's eyes.

    Attributes:
        images, labels: samples [n, C, H, W] in [-1, 1], and the labels asked for [n].
        features, logits: of the samples, float64 [n, d] and [n, classes].
        real: the reference images and their labels.
        real_features: float64 [m, d].
        kid_subset_size: the task's.
        neighbours: how many of the reference's first features neighbourhoods are made of; None is all.
    """

    images: Tensor
    labels: Tensor
    features: Tensor
    logits: Tensor
    real: ImageSet
    real_features: Tensor
    kid_subset_size: int
    neighbours: int | None = None

    @cached_property
    def precision_recall(self) -> tuple[float, float]:
        """Improved precision and recall, which share their distances."""
        return precision_recall(self.features, self.real_features[: self.neighbours])

    @cached_property
    def density_coverage(self) -> tuple[float, float]:
        """Density and coverage, which share their distances."""
        return density_coverage(self.features, self.real_features[: self.neighbours])


class SampleMetric(ABC):
    """A number that judges samples."""

    direction: ClassVar[Direction]
    """Which way is better."""
    heading: ClassVar[str]
    """Of its column in tables."""
    digits: ClassVar[int] = 3
    """After the point, in tables."""
    needs_labels: ClassVar[bool] = False
    """Whether it asks which labels the samples were made for."""

    @abstractmethod
    def __call__(self, judged: Judged) -> float: ...


METRICS: Registry[SampleMetric] = registry_of("metric")
