"""The metrics that every task of images has, by name."""

from __future__ import annotations

from typing import ClassVar

from harness.metrics.base import METRICS, Direction, Judged, SampleMetric
from harness.metrics.fidelity import fid, kid, label_agreement
from harness.metrics.manifold import class_diversity, inception_style_score, memorised_share


@METRICS.register("fid")
class FID(SampleMetric):
    """Frechet distance between the features of samples and of reference images."""

    direction: ClassVar[Direction] = "lower"
    heading, digits = "FID ↓", 2

    def __call__(self, judged: Judged) -> float:
        return fid(judged.features, judged.real_features)


@METRICS.register("kid")
class KID(SampleMetric):
    """Kernel distance (unbiased) between the features of samples and of reference images."""

    direction: ClassVar[Direction] = "lower"
    heading, digits = "KID ↓", 1

    def __call__(self, judged: Judged) -> float:
        return kid(judged.features, judged.real_features, judged.kid_subset_size)


@METRICS.register("label_agreement")
class LabelAgreement(SampleMetric):
    """Share of samples that the feature network classifies as the requested label."""

    direction: ClassVar[Direction] = "higher"
    heading = "label agreement ↑"
    needs_labels = True

    def __call__(self, judged: Judged) -> float:
        return label_agreement(judged.logits, judged.labels)


@METRICS.register("precision")
class Precision(SampleMetric):
    """Share of samples inside the manifold of real features."""

    direction: ClassVar[Direction] = "higher"
    heading = "precision ↑"

    def __call__(self, judged: Judged) -> float:
        return judged.precision_recall[0]


@METRICS.register("recall")
class Recall(SampleMetric):
    """Share of real images inside the manifold of sample features."""

    direction: ClassVar[Direction] = "higher"
    heading = "recall ↑"

    def __call__(self, judged: Judged) -> float:
        return judged.precision_recall[1]


@METRICS.register("density")
class Density(SampleMetric):
    """Number of real neighbourhoods around a sample, relative to its expectation."""

    direction: ClassVar[Direction] = "higher"
    heading = "density ↑"

    def __call__(self, judged: Judged) -> float:
        return judged.density_coverage[0]


@METRICS.register("coverage")
class Coverage(SampleMetric):
    """Share of real neighbourhoods that contain a sample."""

    direction: ClassVar[Direction] = "higher"
    heading = "coverage ↑"

    def __call__(self, judged: Judged) -> float:
        return judged.density_coverage[1]


@METRICS.register("inception_style_score")
class InceptionStyleScore(SampleMetric):
    """Inception score with the task's feature network: confident and varied predictions."""

    direction: ClassVar[Direction] = "higher"
    heading, digits = "inception-style score ↑", 2

    def __call__(self, judged: Judged) -> float:
        return inception_style_score(judged.logits)


@METRICS.register("class_diversity")
class ClassDiversity(SampleMetric):
    """Mean distance between two samples of one class, relative to real images."""

    direction: ClassVar[Direction] = "none"
    heading = "diversity in a class (real = 1)"
    needs_labels = True

    def __call__(self, judged: Judged) -> float:
        return class_diversity(judged.features, judged.labels, judged.real_features, judged.real.labels)


@METRICS.register("memorised_share")
class MemorisedShare(SampleMetric):
    """Share of samples that are far closer to one training image than to any other."""

    direction: ClassVar[Direction] = "lower"
    heading, digits = "memorised ↓", 4

    def __call__(self, judged: Judged) -> float:
        return memorised_share(judged.images, judged.real.images)
