"""The one evaluator. Floor 6: it knows a sampling callable only, no method.

Every run of a task is evaluated on the same noise and labels, with the same features and reference, after the same rounding
to 8 bits; all of that is a metric's identity.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harness.data.cache import cached_samples, cached_tensors
from harness.data.images import to_uint8
from harness.diffusion.conditions import Condition
from harness.errors import RunFailed, UsageError
from harness.files import tensors_digest
from harness.metrics import METRICS, Judged
from harness.metrics.base import Direction
from harness.metrics.compute import count_macs
from harness.metrics.exact import kl_of_map
from harness.metrics.extractors import Extractor
from harness.metrics.features import classify
from harness.metrics.fidelity import distance_to_reference, fid, frechet_distance, label_agreement, sample_moments
from harness.networks.passes import count_passes
from harness.progress import Progress
from harness.records import Metric, code_digest
from harness.solvers import Noise
from harness.tasks import MixtureTask, Task

Sampler = Callable[[Tensor, Condition, Noise], Tensor]
"""From noise [B, C, H, W], conditions and further noise (for stochastic samplers) to samples [B, C, H, W]."""
FEW = 10_000
"""Images whose features are made faster than they are looked up."""
FEATURE_ROOMS = ("metrics/features.py", "networks/classifier.py", "data/images.py")
"""What decides features: cached ones are not used after a change there."""


@torch.no_grad()
def sample_set(sampler: Sampler, task: Task, noise_set: int, device: torch.device, progress: Progress | None = None,
               count: int | None = None) -> Tensor:  # fmt: skip
    """Samples of one evaluation noise set, or the first `count` of them: [N, C, H, W] on the CPU."""
    x_T, cond = task.evaluation_inputs(noise_set)
    x_T = x_T[:count]
    size, done = task.spec.evaluation.batch_size, []
    for start in range(0, len(x_T), size):
        part = slice(start, min(start + size, len(x_T)))
        noise = task.evaluation_noise(noise_set, part)
        done.append(sampler(x_T[part].to(device), cond[part].to(device), noise).float().cpu())
        if progress:
            progress(min(start + size, len(x_T)), len(x_T))
    return torch.cat(done)


DIRECTIONS: dict[str, Direction] = {
    "distance_to_teacher": "lower", "fid_inception": "lower", "fid_clean": "lower", "fd_dinov2": "lower",
    "frechet_distance": "lower", "kl": "lower", "map_error": "lower", "solver_error": "lower",
}  # fmt: skip
"""Of the metrics that need more than samples."""


def directions() -> dict[str, Direction]:
    """Which way is better, for every metric that there is."""
    return {**{name: METRICS[name].direction for name in METRICS.names()}, **DIRECTIONS}


class Evaluator(ABC):
    """The metrics of a task.

    Args:
        reference_samples: the teacher's own output for a noise set, [N, C, H, W].
    """

    milestone_metrics: ClassVar[tuple[str, ...]]
    """What is measured along the budget."""
    identity_more: ClassVar[dict[str, Any]]
    """What a metric's identity holds beside the task."""

    def __init__(self, task: Task, reference_samples: Callable[[int], Tensor]):
        self.task, self.reference_samples = task, reference_samples

    @abstractmethod
    def of_samples(self, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        """Every metric that needs the images [n, C, H, W] and the labels asked for [n], if they are known, alone."""

    @abstractmethod
    def of_noise_set(self, images: Tensor, noise_set: int, sampler: Sampler | None) -> dict[str, float]:
        """Every metric that needs to know from which noise the images [N, C, H, W] were made, or the sampler."""

    def evaluate(self, samples: dict[int, Tensor], sampler: Sampler | None = None) -> dict[str, Metric]:
        """All metrics of samples [N, C, H, W] by noise set, and the floor: the same of held-out real images.

        Args:
            sampler: what made them, if it is deterministic and gradients go through it.

        Raises RunFailed for samples that are not finite.
        """
        by_set: dict[int, dict[str, float]] = {}
        for noise_set, images in samples.items():
            if not bool(images.isfinite().all()):
                raise RunFailed(f"samples of noise set {noise_set} are not finite")
            by_set[noise_set] = self.of_samples(images, self.task.evaluation_inputs(noise_set)[1].labels)
            by_set[noise_set] |= self.of_noise_set(images, noise_set, sampler)
        n = len(next(iter(samples.values())))
        found = {
            name: self._metric(name, {k: measured[name] for k, measured in by_set.items()}, self.count(name, n))
            for name in sorted(set.intersection(*map(set, by_set.values())))
        }
        return found | self.floors()

    def of_file(self, images: Tensor, labels: Tensor | None) -> dict[str, Metric]:
        """The metrics of samples [n, C, H, W] from unknown noise; those that need labels [n] only where these are known."""
        measured = self.of_samples(images, labels)
        return {name: self._metric(name, {0: value}, len(images)) for name, value in measured.items()} | self.floors()

    def floors(self) -> dict[str, Metric]:
        """What the metrics of samples say of held-out real images."""
        n = len(self.task.split.held_out)
        return {f"{name}_floor": self._metric(f"{name}_floor", {0: value}, n) for name, value in self.of_held_out().items()}

    def of_held_out(self) -> dict[str, float]:
        """`of_samples` of the held-out real images."""
        held_out = self.task.split.held_out
        return self.of_samples(held_out.images, held_out.of(torch.arange(len(held_out))).labels)

    def _metric(self, name: str, values: dict[int, float], n: int) -> Metric:
        return Metric(values=values, n=n, direction=directions()[name.removesuffix("_floor")], identity=self.identity(name, n))

    def count(self, name: str, n: int) -> int:
        """How many of n samples a metric is made of."""
        return n

    def quality(self, images: Tensor) -> dict[str, float]:
        """The few metrics of a milestone, of the first samples of noise set 0 [n, C, H, W]."""
        labels = self.task.evaluation_inputs(0)[1][: len(images)].labels
        found = {**self.of_samples(images, labels), **self.of_noise_set(images, 0, None)}
        return {name: found[name] for name in self.milestone_metrics}

    def identity(self, name: str, n: int) -> dict[str, Any]:
        """The identity of a metric: all that determines what its number means."""
        spec, hashes = self.task.spec, self.task.hashes
        return {
            "metric": name, "n": n, "task": spec.name, "task_version": spec.version, **hashes, "noise_seed": spec.evaluation.seed,
            "labels": "balanced", "guidance": spec.guidance.model_dump(), "metrics_version": 1, **self.identity_more,
            "kid_subset_size": spec.evaluation.kid_subset_size,
        } | ({"neighbours": spec.evaluation.neighbours} if spec.evaluation.neighbours else {})  # fmt: skip


class ImageEvaluator(Evaluator):
    """Metrics in the feature space of the task's classifier, after rounding to 8 bits.

    Args:
        device: where features are computed.
        extra: feature networks of the literature, whose Frechet distances stand beside.
    """

    milestone_metrics = ("fid", "label_agreement", "distance_to_teacher")
    identity_more: ClassVar = {"rounding": "uint8", "library": "torch-fidelity for fid and kid"}

    def __init__(self, task: Task, reference_samples: Callable[[int], Tensor], device: torch.device, extra: Sequence[Extractor] = ()):
        super().__init__(task, reference_samples)
        self.classifier, self.device = task.classifier(device), device
        self.reference = self._reference_features()
        self.extra = [(extractor, extractor(task.split.train.images)) for extractor in extra]

    def _reference_features(self) -> Tensor:
        """Features of the training images, float64 [n, 64]; of many they are kept in the cache."""
        images = self.task.split.train.images
        if len(images) < FEW:
            return classify(self.classifier, images)[0]
        key = {**self.task.hashes, "device": self.device.type, "code": code_digest(FEATURE_ROOMS)}
        return cached_samples(key, lambda: classify(self.classifier, images)[0])

    def of_samples(self, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        features, logits = classify(self.classifier, images)
        real, spec = self.task.split.train, self.task.spec.evaluation
        asked = labels if labels is not None else logits.argmax(1)
        judged = Judged(images, asked, features, logits, real, self.reference, spec.kid_subset_size, spec.neighbours)
        metrics = {name: METRICS[name] for name in METRICS.names() if labels is not None or not METRICS[name].needs_labels}
        found = {name: float(metric()(judged)) for name, metric in metrics.items()}
        return found | {extractor.metric: fid(extractor(images), reference) for extractor, reference in self.extra}

    def of_held_out(self) -> dict[str, float]:
        """The same; beside many reference images it is kept in the cache."""
        if len(self.reference) < FEW:
            return super().of_held_out()
        held_out, spec = self.task.split.held_out, self.task.spec.evaluation
        key = {
            **self.task.hashes, "held out": tensors_digest({"images": to_uint8(held_out.images), "labels": held_out.labels}),
            "metrics": METRICS.names(), "kid_subset_size": spec.kid_subset_size, "neighbours": spec.neighbours,
            "extra": [[extractor.metric, extractor.sha256] for extractor, _ in self.extra], "device": self.device.type,
            "code": code_digest(),
        }  # fmt: skip

        def measured() -> dict[str, Tensor]:
            return {name: torch.tensor(value, dtype=torch.float64) for name, value in super(ImageEvaluator, self).of_held_out().items()}

        return {name: float(value) for name, value in cached_tensors(key, measured).items()}

    def identity(self, name: str, n: int) -> dict[str, Any]:
        whole = super().identity(name, n)
        for extractor, _ in self.extra:
            if name.removesuffix("_floor") == extractor.metric:
                whole |= {"features": extractor.sha256, "extractor": type(extractor).__name__}
        return whole

    def of_noise_set(self, images: Tensor, noise_set: int, sampler: Sampler | None) -> dict[str, float]:
        return {"distance_to_teacher": distance_to_reference(images, self.reference_samples(noise_set)[: len(images)])}

    def quality(self, images: Tensor) -> dict[str, float]:
        features, logits = classify(self.classifier, images)
        labels = self.task.evaluation_inputs(0)[1][: len(images)].labels
        found = {"fid": fid(features, self.reference)}
        if labels is not None:
            found["label_agreement"] = label_agreement(logits, labels)
        return found | self.of_noise_set(images, 0, None)


class MixtureEvaluator(Evaluator):
    """Distances to the exact distribution and to the exact ODE map; nothing is rounded and no feature network judges."""

    milestone_metrics = ("frechet_distance", "map_error", "distance_to_teacher")
    identity_more: ClassVar = {"rounding": "none", "library": "torch-fidelity's Frechet distance on exact moments"}
    KL_SAMPLES = 500

    def __init__(self, task: MixtureTask, reference_samples: Callable[[int], Tensor], device: torch.device):
        super().__init__(task, reference_samples)
        self.mixture, self.ode_map, self.device = task.mixture, cache(task.ode_map), device

    def count(self, name: str, n: int) -> int:
        return min(n, self.KL_SAMPLES) if name == "kl" else n

    def of_samples(self, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        return {"frechet_distance": frechet_distance(sample_moments(images.flatten(1)), self.mixture.moments())}

    def of_noise_set(self, images: Tensor, noise_set: int, sampler: Sampler | None) -> dict[str, float]:
        reference, exact = (known(noise_set)[: len(images)] for known in (self.reference_samples, self.ode_map))
        found = {
            "map_error": distance_to_reference(images, exact),
            "solver_error": distance_to_reference(reference, exact),
            "distance_to_teacher": distance_to_reference(images, reference),
        }
        if sampler is not None:
            x_T, cond = self.task.evaluation_inputs(noise_set)
            part, device = slice(0, self.KL_SAMPLES), self.device
            kl = kl_of_map(
                lambda x: sampler(x, cond[part].to(device), lambda name: x), x_T[part].to(device),
                lambda x_0: self.mixture.log_density(x_0, cond[part].classes.to(device)),
            )  # fmt: skip
            if math.isfinite(kl):  # a student that ignores its noise has no density
                found["kl"] = kl
        return found


def evaluator_class(task: Task) -> type[Evaluator]:
    """The kind of evaluator that suits a task."""
    return MixtureEvaluator if isinstance(task, MixtureTask) else ImageEvaluator


def evaluator_of(
    task: Task, reference_samples: Callable[[int], Tensor], device: torch.device, extra: Sequence[Extractor] = ()
) -> Evaluator:
    """The evaluator that suits a task. Raises UsageError for extra features where samples are no images."""
    if isinstance(task, MixtureTask):
        if extra:
            raise UsageError(f"extra_features are of images, but samples of task {task.spec.name} are none: leave it out")
        return MixtureEvaluator(task, reference_samples, device)
    return ImageEvaluator(task, reference_samples, device, extra)


@torch.no_grad()
def sampling_cost(sampler: Sampler, network: nn.Module, task: Task, device: torch.device) -> tuple[float, int]:
    """NFE and MACs a sample, both measured on the sampler as it runs."""
    count = 2
    x_T, cond = task.evaluation_inputs(0)
    x_T, cond = x_T[:count].to(device), cond[:count].to(device)
    with count_passes(network) as passes:
        macs = count_macs(lambda: sampler(x_T, cond, lambda name: x_T))
    return passes.total / count, macs // count


def sample_grid(rows: Sequence[Tensor], columns: int = 20, scale: int = 5, gap: int = 2) -> Tensor:
    """A picture of samples from the same noise, one row for each tensor [n, C, H, W]: uint8 [height, width, 3].

    Each row shows the first `columns` samples; pixels are enlarged `scale` times.
    """
    enlarged = [to_uint8(row[:columns]).repeat_interleave(scale, -1).repeat_interleave(scale, -2) for row in rows]
    framed = [nn.functional.pad(row, (gap, gap, gap, gap), value=255) for row in enlarged]
    picture = torch.cat([torch.cat(list(row), -1) for row in framed], -2)
    return picture.expand(3, -1, -1).permute(1, 2, 0).contiguous()
