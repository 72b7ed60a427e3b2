"""A metric is a decorated function; its parameters name the inputs that it needs.

    @metric("fid", direction="lower", heading="FID ↓", digits=2)
    def fid(features: Features) -> float: ...

The evaluator calls every metric whose inputs exist. So a task of images, an exact task and a bare
file of samples each get their own metrics. `KNOWN` lists all inputs. The built-in metrics are in
`registered.py`; others come from plug-ins.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.metrics.manifold import (
    DENSITY_NEIGHBOURS,
    MANIFOLD_NEIGHBOURS,
    density_coverage,
    half_distances,
    precision_recall,
)
from harness.metrics.moments import Pair
from harness.registry import Registry, registry_of

Direction = Literal["lower", "higher", "none"]
NEITHER = (math.nan, math.nan)

KNOWN = {
    "images": "the samples, [n, C, H, W] in [-1, 1]",
    "real": "the reference images and their labels where samples are images, an `ImageSet`",
    "labels": "the labels that the samples were made for, [n]",
    "prompts": "the prompts of the samples as texts, a list of n strings",
    "features": "samples and reference in the task's feature network, `Features`",
    "logits": "the logits of the task's own classifier for the samples, float64 [n, classes]",
    "spatial": "moments of Inception's spatial features of samples and reference, `Pair` each",
    "split_score": "the Inception score, averaged over contiguous parts of the samples",
    "kid_subset_size": "the task's, at most the number of samples, held-out and reference images",
    "floor_n": "the number of held-out images that the floor rests on, at most n",
    "reading": "what the task's detector reads in the samples, beside their prompts, `Reading`",
    "teacher_moments": "moments of the teacher's features from the same noise, where prompts rule",
    "teacher_samples": "the teacher's output from the same noise, [n, C, H, W]",
    "mixture": "the exact distribution, a `GaussianMixture`",
    "ode_map": "where the exact ODE leads from the same noise, float64 [n, C, H, W]",
    "sampled_map": "the deterministic sampler that made them, `SampledMap`",
    "inception": "features of samples and reference, float64 [n, d] and [m, d]",
    "inception_clean": "the same in clean-fid's protocol",
    "dinov2": "the same in DINOv2",
    "clip": "features of the samples and of their prompts in CLIP, float64 [n, d] each",
}
"""What a metric may ask for, by the name of its parameter."""


@dataclass(frozen=True)
class Features:
    """Features of samples and of real images in one feature network.

    Attributes:
        generated, real: features of samples and reference, float64 [n, d] and [m, d], or None where
            only moments are known.
        moments, real_moments: their means [d] and covariances [d, d], float64.
        neighbours: number of the reference's first features that have neighbourhoods; None is all.
        half: whether precision and recall round distances as ADM's evaluator does.
    """

    generated: Tensor | None
    real: Tensor | None
    moments: Pair
    real_moments: Pair
    neighbours: int | None = None
    half: bool = False

    @property
    def both(self) -> tuple[Tensor, Tensor] | None:
        """Features of samples and of the reference, or None where one is missing."""
        if self.generated is None or self.real is None:
            return None
        return self.generated, self.real

    @property
    def near(self) -> tuple[Tensor, Tensor] | None:
        """The same with the part of the reference that has neighbourhoods."""
        return self.both and (self.both[0], self.both[1][: self.neighbours])

    @cached_property
    def precision_recall(self) -> tuple[float, float]:
        """Improved precision and recall, which share their distances."""
        distances = half_distances if self.half else torch.cdist
        if not self.near or min(map(len, self.near)) <= MANIFOLD_NEIGHBOURS:
            return NEITHER
        return precision_recall(*self.near, distances=distances)

    @cached_property
    def density_coverage(self) -> tuple[float, float]:
        """Density and coverage, which share their distances."""
        if not self.near or len(self.near[1]) <= DENSITY_NEIGHBOURS:
            return NEITHER
        return density_coverage(*self.near)


@dataclass(frozen=True)
class SampledMap:
    """The deterministic sampler that made the samples, with its inputs.

    Attributes:
        sample: differentiable map from noise [n, C, H, W] and conditions to samples [n, C, H, W].
        first: the noise [count, C, H, W] and the conditions of the first samples.
    """

    sample: Callable[[Tensor, Condition], Tensor]
    first: Callable[[int], tuple[Tensor, Condition]]


@dataclass(frozen=True)
class SampleMetric:
    """A number that judges samples: its function and its column in tables.

    Attributes:
        function: returns the number, or NaN where it does not exist.
        direction: which way is better.
        heading, digits: heading and decimal places of its column in tables.
        needs: the names of the function's parameters, each in `KNOWN`.
        milestone: whether it is also measured during training.
        most_samples: the largest number of samples that it uses; None is all.
    """

    name: str
    function: Callable[..., float]
    direction: Direction
    heading: str
    digits: int
    needs: tuple[str, ...]
    milestone: bool
    most_samples: int | None

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]

    def __call__(self, known: Mapping[str, Any]) -> float:
        """Computes the number from inputs that are named as in `KNOWN`."""
        return float(self.function(**{name: known[name] for name in self.needs}))


METRICS: Registry[SampleMetric] = registry_of("metric")
"""Every metric, a `SampleMetric`, by name."""


def metric(
    name: str,
    *,
    direction: Direction,
    heading: str,
    digits: int = 3,
    milestone: bool = False,
    most_samples: int | None = None,
) -> Callable[[Callable[..., float]], SampleMetric]:
    """Registers the decorated function as a metric; see `SampleMetric` for the arguments.

    Raises ValueError if the name is taken or a parameter is not in `KNOWN`.
    """

    def enter(function: Callable[..., float]) -> SampleMetric:
        needs = tuple(inspect.signature(function).parameters)
        if strange := [need for need in needs if need not in KNOWN]:
            raise ValueError(
                f"metric {name!r} asks for {', '.join(strange)}; it may ask for: {', '.join(KNOWN)}"
            )
        made = SampleMetric(
            name, function, direction, heading, digits, needs, milestone, most_samples
        )
        METRICS.register(name, function)(made)
        return made

    return enter
