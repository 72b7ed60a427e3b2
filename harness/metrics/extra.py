"""Feature networks of the literature beside a task's own, each of which adds a Frechet distance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from harness.errors import UsageError
from harness.metrics.extractors import Extractor
from harness.metrics.pixels import Pixels
from harness.metrics.spaces import in_parts, reference_file
from harness.tasks import Task


class ExtraNetworks:
    """Networks with their features of a task's reference images.

    Raises UsageError where samples or the reference are no images.
    """

    def __init__(self, task: Task, networks: Sequence[Extractor], device: torch.device):
        if networks and task.mixture:
            raise UsageError(
                "extra_features are of images, "
                f"but samples of task {task.spec.name} are none: leave it out"
            )
        self.task, self.networks = task, networks
        self._pixels = Pixels(task, device) if networks else None
        self._references = [
            network.of_pictures(self._reference_pictures(network)) for network in networks
        ]

    def of_samples(self, samples: Tensor) -> dict[str, Any]:
        """Features of samples [n, C, H, W] and reference, by the names in `KNOWN`."""
        return {
            network.need: (network.of_pictures(self._pictures([samples], network)), reference)
            for network, reference in zip(self.networks, self._references, strict=True)
        }

    @property
    def widths(self) -> dict[str, int]:
        """Numbers in a feature vector, by the name of the distance."""
        return {
            network.metric: reference.shape[1]
            for network, reference in zip(self.networks, self._references, strict=True)
        }

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
