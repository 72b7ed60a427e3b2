"""The one evaluator: it knows a sampling function and a task, no method.

Every run of a task is evaluated on the same noise and labels, with the same features and reference,
after the same rounding to 8 bits. All of these belong to a metric's identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from harness.data.cache import cached_samples, cached_tensors
from harness.data.images import to_uint8
from harness.diffusion.randomness import Keyed
from harness.errors import RunFailed, UsageError
from harness.files import tensors_digest
from harness.metrics import METRICS
from harness.metrics.base import Features, SampledMap, SampleMetric
from harness.metrics.caveats import singular_covariance
from harness.metrics.extractors import Extractor
from harness.metrics.features import classify
from harness.metrics.fidelity import KID_SUBSETS
from harness.metrics.sampling import Sampler
from harness.provenance import code_digest
from harness.records import Metric
from harness.tasks import Task

FEW = 10_000
"""Sets of fewer images bypass the cache: computing their features is faster than reading them."""


def metrics_of(task: Task) -> dict[str, SampleMetric]:
    """The metrics that a task's runs can have, by name, without those of extra feature networks."""
    known = {"images", "labels", "kid_subset_size", "teacher_samples", "sampled_map"}
    known |= {"mixture", "ode_map"} if task.mixture else {"features", "real", "floor_n"}
    found: dict[str, Any] = {name: METRICS[name] for name in METRICS.names()}
    return {name: metric for name, metric in found.items() if set(metric.needs) <= known}


def milestone_metrics(task: Task) -> list[str]:
    """The metrics that are measured during a task's training."""
    return [name for name, metric in metrics_of(task).items() if metric.milestone]


def numeric_mode(device: torch.device) -> dict[str, Any]:
    """The part of a metric's identity that names the arithmetic of a device.

    Its kind, and whether TF32 rounds the products of matrices or of convolutions.
    """
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    tf32 = device.type == "cuda" and any(backend.allow_tf32 for backend in backends)
    return {"device": device.type, "tf32": tf32}


class Evaluator:
    """The metrics of a task.

    Args:
        reference_samples: the teacher's own output for a noise set, [N, C, H, W].
        device: where features are computed.
        extra: feature networks of the literature, each of which adds a Frechet distance.

    Raises UsageError for extra feature networks where samples are no images.
    """

    def __init__(
        self,
        task: Task,
        reference_samples: Callable[[int], Tensor],
        device: torch.device,
        extra: Sequence[Extractor] = (),
    ):
        if extra and task.mixture:
            raise UsageError(
                "extra_features are of images, "
                f"but samples of task {task.spec.name} are none: leave it out"
            )
        self.task, self.reference_samples, self.device = task, reference_samples, device
        self.classifier = None if task.mixture else task.classifier(device)
        self.reference = self._reference_features()
        self.ode_map = cache(task.ode_map)
        self.extra = [(extractor, extractor(task.split.train.images[:])) for extractor in extra]

    def _reference_features(self) -> Tensor:
        """Features of the training images, float64 [m, d], kept in the cache if there are many."""
        if self.classifier is None:
            return torch.empty(0)
        classifier, images = self.classifier, self.task.split.train.images
        if len(images) < FEW:
            return classify(classifier, images)[0]
        key = {**self.task.hashes, "device": self.device.type, "code": code_digest("metrics")}
        return cached_samples(key, lambda: classify(classifier, images)[0])

    @property
    def kid_subset_size(self) -> int:
        """Images in a subset of KID, the same for samples and for the floor."""
        spec, split = self.task.spec.evaluation, self.task.split
        return min(spec.kid_subset_size, spec.samples, len(split.held_out), len(split.train))

    def floor_n(self, n: int) -> int:
        """Number of held-out images that the floor beside n samples rests on: n if there are."""
        return min(n, len(self.task.split.held_out))

    def known(self, images: Tensor, labels: Tensor | None) -> dict[str, Any]:
        """Inputs of metrics that follow from samples [n, C, H, W] alone, by name."""
        found: dict[str, Any] = {"images": images, "kid_subset_size": self.kid_subset_size}
        if labels is not None:
            found["labels"] = labels
        if self.task.mixture:
            found["mixture"] = self.task.mixture
        if self.classifier is not None:
            generated, logits = classify(self.classifier, images)
            found["real"] = self.task.split.train
            neighbours = self.task.spec.evaluation.neighbours
            found["features"] = Features(generated, logits, self.reference, neighbours)
            found["floor_n"] = self.floor_n(len(images))
        return found

    def extra_features(self, images: Tensor) -> dict[str, Any]:
        """Features of samples and reference in the extra networks, by the names in `KNOWN`."""
        return {
            extractor.need: (extractor(images), reference) for extractor, reference in self.extra
        }

    def known_of_set(
        self, images: Tensor, noise_set: int, sampler: Sampler | None = None
    ) -> dict[str, Any]:
        """Inputs of metrics for samples of known noise, by name.

        Args:
            images: samples from the first n inputs of the noise set, [n, C, H, W].
            sampler: the sampler that made them, if it is deterministic and differentiable.
        """
        x_T, cond = self.task.evaluation_inputs(noise_set)
        n, device = len(images), self.device
        found = self.known(images, cond[:n].labels)
        found["teacher_samples"] = self.reference_samples(noise_set)[:n]
        if self.task.mixture:
            found["ode_map"] = self.ode_map(noise_set)[:n]
        if sampler is not None:
            made = sampler  # for mypy: inside the lambda it is not None
            found["sampled_map"] = SampledMap(
                lambda x, c: made(x, c, lambda name: x), x_T[:n].to(device), cond[:n].to(device)
            )
        return found

    def measure(
        self, known: dict[str, Any], only: Callable[[SampleMetric], bool] = lambda metric: True
    ) -> dict[str, float]:
        """Values of all metrics whose inputs are known and whose number exists."""
        metrics: list[Any] = [METRICS[name] for name in METRICS.names()]
        found = {m.name: m(known) for m in metrics if set(m.needs) <= known.keys() and only(m)}
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def evaluate(
        self, samples: dict[int, Tensor], sampler: Sampler | None = None
    ) -> dict[str, Metric]:
        """All metrics of samples [N, C, H, W] by noise set, and their floors.

        Args:
            sampler: as in `known_of_set`.

        Raises RunFailed for samples that are not finite.
        """
        by_set: dict[int, dict[str, float]] = {}
        for noise_set, images in samples.items():
            if not bool(images.isfinite().all()):
                raise RunFailed(f"samples of noise set {noise_set} are not finite")
            known = self.known_of_set(images, noise_set, sampler) | self.extra_features(images)
            by_set[noise_set] = self.measure(known)
        n = len(next(iter(samples.values())))
        names = sorted(set.intersection(*map(set, by_set.values())))
        found = {
            name: self._metric(name, {k: measured[name] for k, measured in by_set.items()}, n)
            for name in names
        }
        return found | self.floors(n)

    def of_file(self, images: Tensor, labels: Tensor | None) -> dict[str, Metric]:
        """The metrics of samples [n, C, H, W] from unknown noise, with labels [n] if known."""
        measured, n = self.of_samples(images, labels), len(images)
        return {
            name: self._metric(name, {0: value}, n) for name, value in measured.items()
        } | self.floors(n)

    def of_samples(self, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        """Values of all metrics that need only samples [n, C, H, W] and their labels [n]."""
        return self.measure(self.known(images, labels) | self.extra_features(images))

    def quality(self, images: Tensor) -> dict[str, float]:
        """The milestone metrics of the first samples of noise set 0, [n, C, H, W]."""
        return self.measure(self.known_of_set(images, 0), lambda metric: metric.milestone)

    def floors(self, n: int) -> dict[str, Metric]:
        """The metrics of held-out real images, each named after its metric with `_floor`.

        Args:
            n: the number of samples that they stand beside.
        """
        count = self.floor_n(n)
        return {
            f"{name}_floor": self._metric(f"{name}_floor", {0: value}, count)
            for name, value in self.held_out(count).items()
        }

    def held_out(self, count: int) -> dict[str, float]:
        """The metrics of `count` held-out images, kept in the cache where the reference is large.

        Fewer than all are drawn at random, since their order may be that of their classes.
        """
        held_out, spec = self.task.split.held_out, self.task.spec.evaluation
        order = Keyed("evaluate", spec.seed).permutation("floor", len(held_out))
        chosen = order[:count].sort().values
        images, labels = held_out.images[chosen], held_out.of(chosen).labels

        def measure() -> dict[str, float]:
            return self.of_samples(images, labels)

        if len(self.reference) < FEW:
            return measure()
        content = {"images": to_uint8(images), "labels": held_out.labels[chosen]}
        key = {
            **self.task.hashes,
            "held out": tensors_digest(content),
            "metrics": METRICS.names(),
            "kid_subset_size": self.kid_subset_size,
            "neighbours": spec.neighbours,
            "extra": [[extractor.metric, extractor.sha256] for extractor, _ in self.extra],
            **numeric_mode(self.device),
            "code": code_digest("metrics"),
        }

        def tensors() -> dict[str, Tensor]:
            return {
                name: torch.tensor(value, dtype=torch.float64) for name, value in measure().items()
            }

        return {name: float(value) for name, value in cached_tensors(key, tensors).items()}

    def caveats(self, n: int) -> list[str]:
        """Sentences on metrics of n samples that rest on too few images."""
        counts = {
            "samples": n,
            "held-out images": self.floor_n(n),
            "reference images": len(self.task.split.train),
        }
        found = (
            singular_covariance(extractor.metric, features.shape[1], counts)
            for extractor, features in self.extra
        )
        return [sentence for sentence in found if sentence]

    def _metric(self, name: str, values: dict[int, float], n: int) -> Metric:
        metric = METRICS[name.removesuffix("_floor")]
        n = self.floor_n(n) if "floor_n" in metric.needs else min(n, metric.most_samples or n)
        return Metric(
            values=values, n=n, direction=metric.direction, identity=self.identity(name, n)
        )

    def identity(self, name: str, n: int) -> dict[str, Any]:
        """A metric's identity: everything that determines the meaning of its number."""
        spec = self.task.spec
        library = (
            "torch-fidelity's Frechet distance on exact moments"
            if self.task.mixture
            else "torch-fidelity for fid and kid"
        )
        found = {
            "metric": name,
            "n": n,
            "task": spec.name,
            "task_version": spec.version,
            **self.task.hashes,
            "noise_seed": spec.evaluation.seed,
            "labels": "balanced",
            "guidance": spec.guidance.model_dump(),
            "metrics_version": 1,
            "rounding": "none" if self.task.mixture else "uint8",
            "library": library,
            "kid_subset_size": self.kid_subset_size,
            "kid_subsets": KID_SUBSETS,
            **numeric_mode(self.device),
        }
        if self.task.purpose != "evaluate":
            found["noise_purpose"] = self.task.purpose
        if spec.evaluation.neighbours:
            found["neighbours"] = spec.evaluation.neighbours
        for extractor, _ in self.extra:
            if name.removesuffix("_floor") == extractor.metric:
                found |= {"features": extractor.sha256, "extractor": type(extractor).__name__}
        return found
