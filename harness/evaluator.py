"""The one evaluator. Floor 6: it knows a sampling callable only, no method.

Every run of a task is evaluated on the same noise and labels, with the same features and reference, after the same rounding
to 8 bits; all of that is a metric's identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harness.conditions import Condition
from harness.data.images import to_uint8
from harness.denoiser import count_passes
from harness.metrics.compute import count_macs
from harness.metrics.features import classify
from harness.metrics.fidelity import distance_to_reference, fid, kid, label_agreement
from harness.records import Metric
from harness.tasks import Task

Sampler = Callable[[Tensor, Condition], Tensor]
"""From noise [B, C, H, W] and conditions to samples [B, C, H, W]."""
Progress = Callable[[int, int], None]


@torch.no_grad()
def sample_set(sampler: Sampler, task: Task, noise_set: int, device: torch.device, progress: Progress | None = None) -> Tensor:
    """Samples of one evaluation noise set, [N, C, H, W] on the CPU."""
    x_T, cond = task.evaluation_inputs(noise_set)
    size, done = task.spec.evaluation.batch_size, []
    for start in range(0, len(x_T), size):
        part = slice(start, start + size)
        done.append(sampler(x_T[part].to(device), cond[part].to(device)).float().cpu())
        if progress:
            progress(min(start + size, len(x_T)), len(x_T))
    return torch.cat(done)


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

    def identity(self, name: str, **more: Any) -> dict[str, Any]:
        """The identity of a metric on generated samples."""
        spec, hashes = self.task.spec, self.task.hashes
        return {
            "metric": name, "task": spec.name, "task_version": spec.version, "features": hashes["features"],
            "reference": hashes["reference"], "noise_seed": spec.evaluation.seed, "labels": "balanced",
            "rounding": "uint8", **more,
        }  # fmt: skip

    def evaluate(self, samples: dict[int, Tensor]) -> dict[str, Metric]:
        """All metrics of samples [N, C, H, W] by noise set, and the floor of FID and KID.

        Samples that are not finite raise ValueError.
        """
        subset = self.task.spec.evaluation.kid_subset_size
        values: dict[str, dict[int, float]] = {name: {} for name in ("fid", "kid", "label_agreement", "distance_to_teacher")}
        for noise_set, images in samples.items():
            if not bool(images.isfinite().all()):
                raise ValueError(f"samples of noise set {noise_set} are not finite")
            cond = self.task.evaluation_inputs(noise_set)[1]
            features, predicted = classify(self.classifier, images)
            values["fid"][noise_set] = fid(features, self.reference)
            values["kid"][noise_set] = kid(features, self.reference, subset)
            values["label_agreement"][noise_set] = label_agreement(predicted, cond.labels)
            values["distance_to_teacher"][noise_set] = distance_to_reference(images, self.reference_samples(noise_set))
        n = len(next(iter(samples.values())))
        details: dict[str, tuple[Any, dict[str, Any]]] = {
            "fid": ("lower", {"library": "torch-fidelity", "n": n}),
            "kid": ("lower", {"library": "torch-fidelity", "n": n, "subset_size": subset}),
            "label_agreement": ("higher", {"n": n}),
            "distance_to_teacher": ("lower", {"n": n, "teacher": self.task.hashes["teacher"], "unit": "RMS of a pixel in [-1, 1]"}),
        }
        metrics = {
            name: Metric(values=values[name], n=n, direction=direction, identity=self.identity(name, **more))
            for name, (direction, more) in details.items()
        }
        return metrics | self.floor()

    def floor(self) -> dict[str, Metric]:
        """FID and KID of the held-out real images against the reference."""
        held_out = self.task.split.held_out
        features, predicted = classify(self.classifier, held_out.images)
        subset = self.task.spec.evaluation.kid_subset_size
        found = {
            "fid": ("lower", fid(features, self.reference)),
            "kid": ("lower", kid(features, self.reference, subset)),
            "label_agreement": ("higher", label_agreement(predicted, held_out.labels)),
        }
        return {
            f"{name}_floor": Metric(values={0: value}, n=len(held_out), direction=direction,
                                    identity=self.identity(f"{name}_floor", n=len(held_out)))
            for name, (direction, value) in found.items()
        }  # fmt: skip


@torch.no_grad()
def sampling_cost(sampler: Sampler, network: nn.Module, task: Task, device: torch.device) -> tuple[float, int]:
    """NFE and MACs a sample, both measured on the sampler as it runs."""
    count = 2
    x_T, cond = task.evaluation_inputs(0)
    x_T, cond = x_T[:count].to(device), cond[:count].to(device)
    with count_passes(network) as passes:
        macs = count_macs(lambda: sampler(x_T, cond))
    return passes.total / count, macs // count


def sample_grid(rows: Sequence[Tensor], columns: int = 20, scale: int = 5, gap: int = 2) -> Tensor:
    """A picture of samples from the same noise, one row for each tensor [n, C, H, W]: uint8 [height, width, 3].

    Each row shows the first `columns` samples; pixels are enlarged `scale` times.
    """
    enlarged = [to_uint8(row[:columns]).repeat_interleave(scale, -1).repeat_interleave(scale, -2) for row in rows]
    framed = [nn.functional.pad(row, (gap, gap, gap, gap), value=255) for row in enlarged]
    picture = torch.cat([torch.cat(list(row), -1) for row in framed], -2)
    return picture.expand(3, -1, -1).permute(1, 2, 0).contiguous()
