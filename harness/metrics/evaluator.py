"""The one evaluator: it knows a sampling function and a task, no method.

Every run of a task is evaluated on the same noise and labels, with the same features and reference,
after the same rounding to 8 bits. All of these belong to a metric's identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from harness import ranks
from harness.data.cache import cached_tensors
from harness.data.images import to_uint8
from harness.data.pictures import Pictures
from harness.diffusion.conditions import Condition
from harness.diffusion.randomness import Keyed
from harness.errors import UsageError
from harness.files import tensors_digest
from harness.metrics import METRICS
from harness.metrics.base import SampledMap, SampleMetric
from harness.metrics.caveats import collapse, outgrown, singular_covariance
from harness.metrics.elsewhere import known_of, unlike
from harness.metrics.extra import ExtraNetworks
from harness.metrics.extractors import Extractor
from harness.metrics.fidelity import feature_moments
from harness.metrics.following import Reading
from harness.metrics.identities import identity
from harness.metrics.pixels import decoding_of
from harness.metrics.sampling import Sampler, check_finite
from harness.metrics.spaces import (
    FEW,
    JudgeSpace,
    PublishedSpace,
    Report,
    numeric_mode,
    space_of,
)
from harness.provenance import code_digest
from harness.records import Metric
from harness.tasks import Task
from harness.tasks.prompts import written


class Evaluator:
    """The metrics of a task.

    Args:
        reference_samples: the teacher's own output for a noise set, [N, C, H, W].
        device: where features are computed.
        extra: feature networks of the literature, each of which adds a Frechet distance.
        report: as in `space_of`.

    Raises UsageError for extra feature networks where samples are no images, and as `space_of`.
    """

    def __init__(
        self,
        task: Task,
        reference_samples: Callable[[int], Tensor],
        device: torch.device,
        extra: Sequence[Extractor] = (),
        report: Report | None = None,
    ):
        self.task, self.reference_samples, self.device = task, reference_samples, device
        self.space = space_of(task, device, report)
        # Computed before anything is trained, so that what is missing is found at once.
        self.reference = self.space.reference if self.space else None
        self.extra = ExtraNetworks(task, extra, device)

    @property
    def has_floor(self) -> bool:
        """Whether held-out real samples stand beside the reference."""
        if self.task.spec.evaluation.reference_npz or self.task.spec.features is None:
            return self.task.mixture is not None
        return len(self.task.split.held_out) > 1

    @property
    def kid_subset_size(self) -> int:
        """Images in a subset of KID, the same for samples and for the floor."""
        spec = self.task.spec.evaluation
        sizes = [spec.kid_subset_size, spec.samples]
        if self.has_floor:
            sizes.append(len(self.task.split.held_out))
        if self.task.mixture:
            sizes.append(len(self.task.split.train))
        elif self.space and self.space.reference_size:
            sizes.append(self.space.reference_size)
        return min(sizes)

    def floor_n(self, n: int) -> int:
        """Number of held-out images that the floor beside n samples rests on: n if there are."""
        return min(n, len(self.task.split.held_out))

    def known(self, images: Tensor, numbers: Tensor | None, keep: bool = False) -> dict[str, Any]:
        """Inputs of metrics that follow from samples [n, C, H, W] alone, by name.

        Args:
            numbers: labels of the samples, or numbers of their prompts, [n].
            keep: whether the features of a published network go to the cache.
        """
        found: dict[str, Any] = {"images": images, "kid_subset_size": self.kid_subset_size}
        if numbers is not None and not self.task.spec.prompts:
            found["labels"] = numbers
        if numbers is not None and (told := self.task.judged_prompts):
            found["prompts"] = [told[number]["prompt"] for number in numbers.tolist()]
        if self.task.mixture:
            found["mixture"] = self.task.mixture
        if self.space is not None:
            found |= self.space.of_samples(images, keep)
        if numbers is not None and "seen" in found:
            found["reading"] = Reading(numbers, written(judged=True), found["seen"])
        if self.has_floor:
            found["floor_n"] = self.floor_n(len(images))
        return found

    def known_of_set(
        self, images: Tensor, noise_set: int, sampler: Sampler | None = None, keep: bool = False
    ) -> dict[str, Any]:
        """Inputs of metrics for samples of known noise, by name.

        Args:
            images: samples from the first n inputs of the noise set, [n, C, H, W].
            sampler: the sampler that made them, if it is deterministic and differentiable.
            keep: as in `known`.
        """
        n, numbers = len(images), self.task.evaluation_numbers(noise_set)
        found = self.known(images, numbers[:n], keep)
        found["teacher_samples"] = self.reference_samples(noise_set)[:n]
        if isinstance(self.space, JudgeSpace):
            features, _ = self.space.classify(found["teacher_samples"])
            found["teacher_moments"] = feature_moments(features)
        if self.task.mixture:
            found["ode_map"] = self.task.ode_map(noise_set)[:n]
        if sampler is not None:
            made = sampler  # for mypy: inside the lambda it is not None

            def first(count: int) -> tuple[Tensor, Condition]:
                x_T, cond = self.task.evaluation_inputs(noise_set, slice(min(count, n)))
                return x_T.to(self.device), cond.to(self.device)

            found["sampled_map"] = SampledMap(lambda x, c: made(x, c, lambda name: x), first)
        return found

    def measure(
        self, known: dict[str, Any], only: Callable[[SampleMetric], bool] = lambda metric: True
    ) -> dict[str, float]:
        """Values of all metrics whose inputs are known and whose number exists."""
        metrics: list[Any] = [METRICS[name] for name in METRICS.names()]
        asked = [m for m in metrics if set(m.needs) <= known.keys() and only(m)]
        found = ranks.told_by_first(lambda: {m.name: m(known) for m in asked})
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
            check_finite(images, noise_set)
            known = self.known_of_set(images, noise_set, sampler, keep=True)
            numbers = self.task.evaluation_numbers(noise_set)[: len(images)]
            by_set[noise_set] = self.measure(known | self.extra.of_samples(images, numbers))
        n = len(next(iter(samples.values())))
        names = sorted(set.intersection(*map(set, by_set.values())))
        found = {
            name: self._metric(name, {k: measured[name] for k, measured in by_set.items()}, n)
            for name in names
        }
        return found | self.floors(n)

    def known_of_pictures(self, pictures: Pictures) -> dict[str, Any]:
        """Inputs of metrics for 8-bit pictures from unknown noise, by name.

        Raises UsageError where nothing judges pictures, where they do not fit, and for prompts that
        the task's detector does not understand.
        """
        if self.space is None:
            raise UsageError(f"task {self.task.spec.name} has nothing that judges pictures")
        found = {"kid_subset_size": self.kid_subset_size, **known_of(pictures, self.space)}
        if pictures.labels is not None and not self.task.spec.prompts:
            found["labels"] = pictures.labels
        if self.has_floor:
            found["floor_n"] = self.floor_n(len(pictures))
        return found

    def of_pictures(
        self, pictures: Pictures, known: dict[str, Any] | None = None
    ) -> dict[str, Metric]:
        """The metrics of 8-bit pictures from unknown noise.

        Args:
            known: what `known_of_pictures` gives, if it is computed already.

        Raises UsageError as `known_of_pictures`.
        """
        n, other = len(pictures), unlike(self.task, pictures)
        values = self.measure(self.known_of_pictures(pictures) if known is None else known)
        found = {name: self._metric(name, {0: value}, n, other) for name, value in values.items()}
        return found | self.floors(n)

    def of_samples(self, images: Tensor, numbers: Tensor | None) -> dict[str, float]:
        """Values of all metrics that need only samples [n, C, H, W] and their labels [n].

        With prompts, numbers of `judged_conditions` take the place of labels.
        """
        known = self.known(images, numbers, keep=True)
        return self.measure(known | self.extra.of_samples(images, numbers))

    def quality(self, images: Tensor) -> dict[str, float]:
        """The milestone metrics of the first samples of noise set 0, [n, C, H, W].

        Raises RunFailed for samples that are not finite.
        """
        check_finite(images, 0)
        return self.measure(self.known_of_set(images, 0), lambda metric: metric.milestone)

    def floors(self, n: int) -> dict[str, Metric]:
        """The metrics of held-out real images, each named after its metric with `_floor`.

        Args:
            n: the number of samples that they stand beside.
        """
        if not self.has_floor:
            return {}
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
        images, numbers = held_out.images[chosen], held_out.labels[chosen]

        def measure() -> dict[str, float]:
            return self.of_samples(images, numbers)

        if self.task.mixture or len(self.task.split.reference) < FEW:
            return measure()
        seen = images if self.task.latent else to_uint8(images)
        content = {"images": seen, "labels": held_out.labels[chosen]}
        key = {
            **self.task.hashes,
            "held out": tensors_digest(content),
            "metrics": METRICS.names(),
            "kid_subset_size": self.kid_subset_size,
            "neighbours": spec.neighbours,
            "half_distances": spec.half_distances,
            "rounding": spec.rounding,
            **decoding_of(self.task),
            "extra": self.extra.names,
            **numeric_mode(self.device),
            "code": code_digest("metrics"),
        }

        def tensors() -> dict[str, Tensor]:
            return {
                name: torch.tensor(value, dtype=torch.float64) for name, value in measure().items()
            }

        return {name: float(value) for name, value in cached_tensors(key, tensors).items()}

    def caveats(self, n: int) -> list[str]:
        """Sentences on metrics of n samples that rest on too few images, or that are missing."""
        if self.space is None and not self.task.mixture:
            return ["nothing judges the samples: only their distance to the teacher is measured"]
        counts = {"samples": n}
        if self.has_floor:
            counts["held-out images"] = self.floor_n(n)
        size = self.space.reference_size if self.space else 0
        if size:
            counts["reference images"] = size
        widths = self.extra.widths
        if isinstance(self.space, PublishedSpace):
            widths["fid"] = len(self.space.reference.moments[0])
        elif self.space:
            widths["fid"] = self.space.reference.shape[1]
        found = (singular_covariance(name, width, counts) for name, width in widths.items())
        return [sentence for sentence in found if sentence]

    def beside_teacher(self, samples: Tensor) -> list[str]:
        """Sentences if the first noise set's samples [N, C, H, W] collapsed or ran away.

        See `caveats.collapse` and `caveats.outgrown`.
        """
        numbers = self.task.evaluation_numbers(0)[: len(samples)]
        teacher = self.reference_samples(0)[: len(samples)]
        found = (collapse(samples, teacher, numbers), outgrown(samples, teacher))
        return [sentence for sentence in found if sentence]

    def _metric(
        self, name: str, values: dict[int, float], n: int, other: dict[str, Any] | None = None
    ) -> Metric:
        metric = METRICS[name.removesuffix("_floor")]
        n = self.floor_n(n) if "floor_n" in metric.needs else min(n, metric.most_samples or n)
        identity = self.identity(name, n) | (other or {})
        return Metric(values=values, n=n, direction=metric.direction, identity=identity)

    def identity(self, name: str, n: int) -> dict[str, Any]:
        """A metric's identity; see `harness.metrics.identities.identity`."""
        extra, subset = self.extra.networks, self.kid_subset_size
        return identity(self.task, self.space, self.device, name, n, subset, extra)
