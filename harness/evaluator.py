"""The one evaluator. Floor 6: it knows a sampling callable only, no method.

Every run of a task is evaluated on the same noise and labels, with the same features and reference, after the same rounding
to 8 bits; all of that is a metric's identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.conditions import Condition
from harness.data.images import to_uint8
from harness.denoiser import count_passes
from harness.metrics.compute import count_macs
from harness.metrics.features import classify
from harness.metrics.fidelity import distance_to_reference, fid, kid, label_agreement
from harness.metrics.manifold import class_diversity, density_coverage, inception_style_score, memorised_share, precision_recall
from harness.records import Metric
from harness.solvers import Noise
from harness.tasks import Task

Sampler = Callable[[Tensor, Condition, Noise], Tensor]
"""From noise [B, C, H, W], conditions and further noise (for stochastic samplers) to samples [B, C, H, W]."""
Progress = Callable[[int, int], None]


@torch.no_grad()
def sample_set(sampler: Sampler, task: Task, noise_set: int, device: torch.device, progress: Progress | None = None) -> Tensor:
    """Samples of one evaluation noise set, [N, C, H, W] on the CPU."""
    x_T, cond = task.evaluation_inputs(noise_set)
    size, done = task.spec.evaluation.batch_size, []
    for start in range(0, len(x_T), size):
        part = slice(start, start + size)
        noise = task.evaluation_noise(noise_set, part)
        done.append(sampler(x_T[part].to(device), cond[part].to(device), noise).float().cpu())
        if progress:
            progress(min(start + size, len(x_T)), len(x_T))
    return torch.cat(done)


DIRECTIONS: dict[str, Literal["lower", "higher", "none"]] = {
    "fid": "lower", "kid": "lower", "precision": "higher", "recall": "higher", "density": "higher", "coverage": "higher",
    "inception_style_score": "higher", "class_diversity": "none", "label_agreement": "higher", "memorised_share": "lower",
    "distance_to_teacher": "lower",
}  # fmt: skip

MILESTONE_METRICS = ("fid", "label_agreement", "distance_to_teacher")


class Evaluator:
    """The metrics of a task.

    Args:
        reference_samples: the teacher's own output for a noise set, [N, C, H, W].
        device: where features are computed.
    """

    def __init__(self, task: Task, reference_samples: Callable[[int], Tensor], device: torch.device):
        self.task, self.reference_samples = task, reference_samples
        self.classifier = task.classifier(device)
        self.reference = classify(self.classifier, task.split.train.images)[0]

    def evaluate(self, samples: dict[int, Tensor]) -> dict[str, Metric]:
        """All metrics of samples [N, C, H, W] by noise set, and the floor: the same of held-out real images.

        Samples that are not finite raise ValueError.
        """
        by_set: dict[int, dict[str, float]] = {}
        for noise_set, images in samples.items():
            if not bool(images.isfinite().all()):
                raise ValueError(f"samples of noise set {noise_set} are not finite")
            by_set[noise_set] = self._measure(images, self.task.evaluation_inputs(noise_set)[1].labels)
            by_set[noise_set]["distance_to_teacher"] = distance_to_reference(images, self.reference_samples(noise_set))
        n, held_out = len(next(iter(samples.values()))), self.task.split.held_out
        found = {
            name: Metric(values={k: measured[name] for k, measured in by_set.items()}, n=n, direction=DIRECTIONS[name],
                         identity=self.identity(name, n))
            for name in next(iter(by_set.values()))
        }  # fmt: skip
        for name, value in self._measure(held_out.images, held_out.labels).items():
            identity = self.identity(f"{name}_floor", len(held_out))
            found[f"{name}_floor"] = Metric(values={0: value}, n=len(held_out), direction=DIRECTIONS[name], identity=identity)
        return found

    def _measure(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Every metric that needs the images [n, C, H, W] and the labels asked for [n] alone."""
        train = self.task.split.train
        features, logits = classify(self.classifier, images)
        precision, recall = precision_recall(features, self.reference)
        density, coverage = density_coverage(features, self.reference)
        return {
            "fid": fid(features, self.reference),
            "kid": kid(features, self.reference, self.task.spec.evaluation.kid_subset_size),
            "precision": precision, "recall": recall, "density": density, "coverage": coverage,
            "inception_style_score": inception_style_score(logits),
            "class_diversity": class_diversity(features, labels, self.reference, train.labels),
            "label_agreement": label_agreement(logits, labels),
            "memorised_share": memorised_share(images, train.images),
        }  # fmt: skip

    def quality(self, samples: Tensor) -> dict[str, float]:
        """The few metrics of a milestone, of samples of noise set 0 [N, C, H, W]."""
        features, logits = classify(self.classifier, samples)
        labels = self.task.evaluation_inputs(0)[1].labels
        found = (fid(features, self.reference), label_agreement(logits, labels), distance_to_reference(samples, self.reference_samples(0)))
        return dict(zip(MILESTONE_METRICS, found, strict=True))

    def identity(self, name: str, n: int) -> dict[str, Any]:
        """The identity of a metric: all that determines what its number means."""
        spec, hashes = self.task.spec, self.task.hashes
        return {
            "metric": name, "n": n, "task": spec.name, "task_version": spec.version, **hashes, "rounding": "uint8",
            "noise_seed": spec.evaluation.seed, "labels": "balanced", "kid_subset_size": spec.evaluation.kid_subset_size,
            "guidance": spec.guidance.model_dump(), "library": "torch-fidelity for fid and kid", "metrics_version": 1,
        }  # fmt: skip


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
