"""Which samples a training step sees: keyed orders of the sources, split into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from harness.diffusion.randomness import Keyed
from harness.methods.base import Batch, Method
from harness.training.settings import TrainSettings


class Source(Protocol):
    """Samples by item number: real images or trajectories."""

    def __len__(self) -> int: ...

    def batch(self, items: Tensor) -> Any: ...


class Items:
    """Maps sample numbers to items: each epoch goes through the source in a new keyed order."""

    def __init__(self, name: str, size: int, seed: int):
        self.name, self.size, self.keys = name, size, Keyed("order", seed)
        self._orders: dict[int, Tensor] = {}

    def __call__(self, index: Tensor) -> Tensor:
        """The items of sample numbers [B], int64 [B]."""
        epochs, items = index // self.size, torch.empty_like(index)
        for epoch in epochs.unique().tolist():
            if epoch not in self._orders:
                self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
                self._orders[epoch] = self.keys.permutation(f"{self.name} epoch {epoch}", self.size)
            here = epochs == epoch
            items[here] = self._orders[epoch][index[here] % self.size]
        return items


class Batches:
    """Makes the micro-batches of a step.

    Raises ValueError if a source that the method needs is missing.
    """

    def __init__(
        self,
        method: Method,
        sources: Mapping[str, Source],
        settings: TrainSettings,
        device: torch.device,
    ):
        missing = method.sources - sources.keys()
        if missing:
            raise ValueError(
                f"the method needs the sources {sorted(method.sources)}, "
                f"but {sorted(missing)} are not given"
            )
        self.sources = {name: sources[name] for name in method.sources}
        self.items = {
            name: Items(name, len(source), settings.seed) for name, source in self.sources.items()
        }
        self.settings, self.device = settings, device

    def of_step(self, step: int) -> list[Batch]:
        """The micro-batches of a step, which together are samples step B .. step B + B - 1."""
        size = self.settings.batch_size
        index = torch.arange(step * size, (step + 1) * size)
        return [
            self.of_samples(step, part)
            for part in index.split(self.settings.micro_batch_size or size)
        ]

    def of_samples(self, step: int, index: Tensor) -> Batch:
        """A batch of these sample numbers, on the trainer's device."""
        drawn = {
            name: source.batch(self.items[name](index)) for name, source in self.sources.items()
        }
        data, trajectory = drawn.get("data"), drawn.get("trajectory")
        if data is not None:
            data = (data[0].to(self.device), data[1].to(self.device))
        if trajectory is not None:
            trajectory = trajectory.to(self.device)
        return Batch(
            index.to(self.device), data, trajectory, Keyed("train", self.settings.seed, step)
        )
