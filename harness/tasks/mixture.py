"""A task with a known distribution: a Gaussian mixture replaces images and the trained teacher."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from harness.data.cache import cached_samples
from harness.data.images import ImageSet, Split
from harness.data.mixture import ExactNetwork, GaussianMixture
from harness.diffusion.denoiser import Guided
from harness.diffusion.randomness import Keyed
from harness.files import digest, tensors_digest
from harness.provenance import code_digest
from harness.tasks.spec import TaskSpec
from harness.tasks.task import Task


class MixtureTask(Task):
    """A task whose teacher, density and ODE map are exact."""

    mixture: GaussianMixture

    def __init__(self, spec: TaskSpec, folder: Path | None = None):
        super().__init__(spec, folder)
        assert spec.mixture is not None
        m, size = spec.mixture, math.prod(self.shape)
        self.mixture = GaussianMixture.drawn(
            m.seed, self.num_classes, m.components, size, m.spread, m.stds
        )

    @cached_property
    def split(self) -> Split:
        """Exact samples with balanced labels, which replace real images."""
        spec = self.spec.mixture
        assert spec is not None

        def samples(first: int, count: int) -> ImageSet:
            index = torch.arange(first, first + count)
            labels = self.conditions.balanced(index).classes
            return ImageSet(
                self.mixture.sample(Keyed("data", spec.seed), index, labels).view(-1, *self.shape),
                labels,
            )

        return Split(samples(0, spec.train), samples(spec.train, spec.held_out))

    def teacher(self, device: torch.device) -> Guided:
        """The exact denoiser under the task's guidance."""
        return self.guided(ExactNetwork(self.mixture, self.schedule).to(device))

    @cached_property
    def teacher_hash(self) -> str:
        """SHA-256 of everything that determines the exact denoiser."""
        numbers = tensors_digest({"means": self.mixture.means, "stds": self.mixture.stds})
        return digest([numbers, self.spec.schedule, self.spec.prediction_type])

    @property
    def hashes(self) -> dict[str, str]:
        return {
            "teacher": self.teacher_hash,
            "features": "the samples themselves",
            "reference": "exact moments and density",
        }

    def ode_map(self, noise_set: int) -> Tensor:
        """Where the exact ODE leads from the noise of `evaluation_inputs`, float64 [N, C, H, W].

        It takes seconds, so it is kept in the cache.
        """
        evaluation = self.spec.evaluation
        key = {
            "ode_map": self.teacher_hash,
            "noise": [self.purpose, evaluation.seed, evaluation.samples, noise_set],
            "code": code_digest(),
        }

        def ends() -> Tensor:
            x_T, cond = self.evaluation_inputs(noise_set)
            return self.mixture.ode_map(x_T.flatten(1), cond.classes, self.schedule)

        return cached_samples(key, ends).view(-1, *self.shape)
