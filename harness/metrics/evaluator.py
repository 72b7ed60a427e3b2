"""The one evaluator: it knows a sampling function and a task, no method.

Every run of a task is evaluated on the same noise and labels, with the same features and reference,
after the same rounding to 8 bits; all of that is a metric's identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from harness.data.cache import cached_samples, cached_tensors
from harness.data.images import to_uint8
from harness.diffusion.conditions import Condition
from harness.errors import RunFailed, UsageError
from harness.files import tensors_digest
from harness.metrics import METRICS
from harness.metrics.base import Features, SampledMap, SampleMetric
from harness.metrics.compute import count_macs
from harness.metrics.extractors import Extractor
from harness.metrics.features import classify
from harness.networks.passes import count_passes
from harness.progress import Progress
from harness.provenance import code_digest
from harness.records import Metric
from harness.solvers import Noise
from harness.tasks import Task

Sampler = Callable[[Tensor, Condition, Noise], Tensor]
"""From noise [B, C, H, W], conditions and further noise (for stochastic samplers) to samples [B, C, H, W]."""
FEW = 10_000
"""Images whose features are made faster than they are looked up."""


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


def metrics_of(task: Task) -> dict[str, SampleMetric]:
    """The metrics that a task's runs can have, by name; those of further feature networks left out."""
    known = {"images", "labels", "kid_subset_size", "teacher_samples", "sampled_map"}
    known |= {"mixture", "ode_map"} if task.mixture else {"features", "real"}
    found: dict[str, Any] = {name: METRICS[name] for name in METRICS.names()}
    return {name: metric for name, metric in found.items() if set(metric.needs) <= known}


def milestone_metrics(task: Task) -> list[str]:
    """The metrics that are measured along a task's training."""
    return [name for name, metric in metrics_of(task).items() if metric.milestone]


class Evaluator:
    """The metrics of a task.

    Args:
        reference_samples: the teacher's own output for a noise set, [N, C, H, W].
        device: where features are computed.
        extra: feature networks of the literature, whose Frechet distances stand beside.

    Raises UsageError for extra feature networks where samples are no images.
    """

    def __init__(self, task: Task, reference_samples: Callable[[int], Tensor], device: torch.device, extra: Sequence[Extractor] = ()):
        if extra and task.mixture:
            raise UsageError(f"extra_features are of images, but samples of task {task.spec.name} are none: leave it out")
        self.task, self.reference_samples, self.device = task, reference_samples, device
        self.classifier = None if task.mixture else task.classifier(device)
        self.reference = self._reference_features()
        self.ode_map = cache(task.ode_map)
        self.extra = [(extractor, extractor(task.split.train.images)) for extractor in extra]

    def _reference_features(self) -> Tensor:
        """Features of the training images, float64 [m, d], kept in the cache if there are many."""
        if self.classifier is None:
            return torch.empty(0)
        classifier, images = self.classifier, self.task.split.train.images
        if len(images) < FEW:
            return classify(classifier, images)[0]
        key = {**self.task.hashes, "device": self.device.type, "code": code_digest("metrics")}
        return cached_samples(key, lambda: classify(classifier, images)[0])

    def known(self, images: Tensor, labels: Tensor | None) -> dict[str, Any]:
        """What samples [n, C, H, W] alone say, by the names that metrics ask for."""
        spec = self.task.spec.evaluation
        found: dict[str, Any] = {"images": images, "kid_subset_size": spec.kid_subset_size}
        if labels is not None:
            found["labels"] = labels
        if self.task.mixture:
            found["mixture"] = self.task.mixture
        if self.classifier is not None:
            generated, logits = classify(self.classifier, images)
            found["real"] = self.task.split.train
            found["features"] = Features(generated, logits, self.reference, spec.neighbours)
        return found

    def extra_features(self, images: Tensor) -> dict[str, Any]:
        """Features of samples and reference in the networks of the literature, by the names that metrics ask for."""
        return {extractor.need: (extractor(images), reference) for extractor, reference in self.extra}

    def known_of_set(self, images: Tensor, noise_set: int, sampler: Sampler | None = None) -> dict[str, Any]:
        """The same of samples whose noise is known, the first [n] of a noise set.

        Args:
            sampler: what made them, if it is deterministic and gradients go through it.
        """
        x_T, cond = self.task.evaluation_inputs(noise_set)
        n, device = len(images), self.device
        found = self.known(images, cond[:n].labels)
        found["teacher_samples"] = self.reference_samples(noise_set)[:n]
        if self.task.mixture:
            found["ode_map"] = self.ode_map(noise_set)[:n]
        if sampler is not None:
            made = sampler  # a name that stays bound
            found["sampled_map"] = SampledMap(lambda x, c: made(x, c, lambda name: x), x_T[:n].to(device), cond[:n].to(device))
        return found

    def measure(self, known: dict[str, Any], only: Callable[[SampleMetric], bool] = lambda metric: True) -> dict[str, float]:
        """Every metric whose needs are met and whose number exists."""
        metrics: list[Any] = [METRICS[name] for name in METRICS.names()]
        found = {m.name: m(known) for m in metrics if set(m.needs) <= known.keys() and only(m)}
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def evaluate(self, samples: dict[int, Tensor], sampler: Sampler | None = None) -> dict[str, Metric]:
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
        found = {name: self._metric(name, {k: measured[name] for k, measured in by_set.items()}, n) for name in names}
        return found | self.floors()

    def of_file(self, images: Tensor, labels: Tensor | None) -> dict[str, Metric]:
        """The metrics of samples [n, C, H, W] from unknown noise, with labels [n] if they are known."""
        measured, n = self.of_samples(images, labels), len(images)
        return {name: self._metric(name, {0: value}, n) for name, value in measured.items()} | self.floors()

    def of_samples(self, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        """The values of all metrics that samples [n, C, H, W] alone have."""
        return self.measure(self.known(images, labels) | self.extra_features(images))

    def quality(self, images: Tensor) -> dict[str, float]:
        """The milestone metrics of the first samples of noise set 0, [n, C, H, W]."""
        return self.measure(self.known_of_set(images, 0), lambda metric: metric.milestone)

    def floors(self) -> dict[str, Metric]:
        """The metrics of held-out real images, each named after its metric with `_floor`."""
        n = len(self.task.split.held_out)
        return {f"{name}_floor": self._metric(f"{name}_floor", {0: value}, n) for name, value in self.held_out().items()}

    def held_out(self) -> dict[str, float]:
        """The metrics of held-out real images, kept in the cache where the reference is large."""
        held_out = self.task.split.held_out
        labels = held_out.of(torch.arange(len(held_out))).labels

        def measure() -> dict[str, float]:
            return self.of_samples(held_out.images, labels)

        if len(self.reference) < FEW:
            return measure()
        spec = self.task.spec.evaluation
        images = {"images": to_uint8(held_out.images), "labels": held_out.labels}
        key = {
            **self.task.hashes,
            "held out": tensors_digest(images),
            "metrics": METRICS.names(),
            "kid_subset_size": spec.kid_subset_size,
            "neighbours": spec.neighbours,
            "extra": [[extractor.metric, extractor.sha256] for extractor, _ in self.extra],
            "device": self.device.type,
            "code": code_digest("metrics"),
        }

        def tensors() -> dict[str, Tensor]:
            return {name: torch.tensor(value, dtype=torch.float64) for name, value in measure().items()}

        return {name: float(value) for name, value in cached_tensors(key, tensors).items()}

    def _metric(self, name: str, values: dict[int, float], n: int) -> Metric:
        metric = METRICS[name.removesuffix("_floor")]
        n = min(n, metric.most_samples or n)
        return Metric(values=values, n=n, direction=metric.direction, identity=self.identity(name, n))

    def identity(self, name: str, n: int) -> dict[str, Any]:
        """A metric's identity: all that determines what its number means."""
        spec = self.task.spec
        library = "torch-fidelity's Frechet distance on exact moments" if self.task.mixture else "torch-fidelity for fid and kid"
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
            "kid_subset_size": spec.evaluation.kid_subset_size,
        }
        if spec.evaluation.neighbours:
            found["neighbours"] = spec.evaluation.neighbours
        for extractor, _ in self.extra:
            if name.removesuffix("_floor") == extractor.metric:
                found |= {"features": extractor.sha256, "extractor": type(extractor).__name__}
        return found


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
    """A picture of samples from the same noise, one row for each tensor [n, C, H, W].

    Each row shows the first `columns` samples; pixels are enlarged `scale` times.

    Returns:
        uint8 [height, width, 3].
    """
    enlarged = [to_uint8(row[:columns]).repeat_interleave(scale, -1).repeat_interleave(scale, -2) for row in rows]
    framed = [nn.functional.pad(row, (gap, gap, gap, gap), value=255) for row in enlarged]
    picture = torch.cat([torch.cat(list(row), -1) for row in framed], -2)
    return picture.expand(3, -1, -1).permute(1, 2, 0).contiguous()
