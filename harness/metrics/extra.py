"""Feature networks of the literature beside a task's own, each of which adds a metric."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from harness.errors import UsageError
from harness.metrics.clip import CLIP, QuickCLIP
from harness.metrics.extractors import CleanInception, DINOv2, Extractor, Inception
from harness.metrics.pixels import Pixels
from harness.metrics.spaces import in_parts, reference_file
from harness.tasks import Task

EXTRACTORS: dict[str, type[Extractor]] = {
    "inception": Inception,
    "inception-clean": CleanInception,
    "dinov2": DINOv2,
    "clip": CLIP,
    "clip-quickgelu": QuickCLIP,
}


class ExtraNetworks:
    """Networks with their features of a task's reference images, or of its prompts.

    Raises UsageError where samples or the reference are no images, and where CLIP cannot read the
    prompts.
    """

    def __init__(self, task: Task, networks: Sequence[Extractor], device: torch.device):
        if networks and task.mixture:
            raise UsageError(
                "extra_features are of images, "
                f"but samples of task {task.spec.name} are none: leave it out"
            )
        self.task, self.networks = task, networks
        self._pixels = Pixels(task, device) if networks else None
        self._references = [self._reference(network) for network in networks]

    def of_samples(self, samples: Tensor, numbers: Tensor | None) -> dict[str, Any]:
        """Features of samples [n, C, H, W] and reference, by the names in `KNOWN`.

        Args:
            numbers: labels of the samples, or numbers of their prompts, [n].
        """
        found = {}
        for network, reference in zip(self.networks, self._references, strict=True):
            if isinstance(network, CLIP):
                if numbers is None:
                    continue
                reference = reference[numbers]
            pictures = self._pictures([samples], network)
            found[network.need] = network.of_pictures(pictures), reference
        return found

    @property
    def names(self) -> list[list[str]]:
        """Metric, kind and SHA-256 of each network."""
        return [[each.metric, type(each).__name__, each.sha256] for each in self.networks]

    @property
    def widths(self) -> dict[str, int]:
        """Numbers in a feature vector, by the name of the Frechet distance."""
        return {
            network.metric: reference.shape[1]
            for network, reference in zip(self.networks, self._references, strict=True)
            if not isinstance(network, CLIP)
        }

    def _reference(self, network: Extractor) -> Tensor:
        """Features of the reference images, or of all prompts, float64 [m, d]."""
        if not isinstance(network, CLIP):
            return network.of_pictures(self._reference_pictures(network))
        if (told := self.task.judged_prompts) is None:
            raise UsageError(
                f"CLIPScore needs prompts in words, but task {self.task.spec.name} has none: "
                "leave clip out of extra_features"
            )
        return network.of_prompts([each["prompt"] for each in told])

    def _reference_pictures(self, network: Extractor) -> Iterable[Tensor]:
        """The reference images, uint8 [B, C, H, W] each."""
        file = reference_file(self.task)
        if file and file.pictures is None:
            raise UsageError(f"extra_features need reference images, but {file.path} has none")
        if file and file.pictures:
            return file.pictures.batches(network.at_once)
        return self._pictures(in_parts(self.task.split.reference), network)

    def _pictures(self, parts: Iterable[Tensor], network: Extractor) -> Iterable[Tensor]:
        """Samples as pictures, uint8 [B, C, H, W] each."""
        assert self._pixels is not None
        for part in parts:
            yield from self._pixels.batches(part, network.at_once)
