"""Which samples a training step sees: keyed orders of the sources, split into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from harness import ranks
from harness.data.images import ImageSet
from harness.data.readers import Reader
from harness.diffusion.randomness import Keyed
from harness.methods.base import Batch, Method
from harness.solvers import Trajectory
from harness.training.distributed import share_of
from harness.training.settings import TrainSettings

AHEAD = 4
"""Steps that are read before they are asked for, a thread each."""


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
            kept = self._orders  # another thread may replace it
            order = kept.get(epoch)
            if order is None:
                order = self.keys.permutation(f"{self.name} epoch {epoch}", self.size)
                self._orders = {e: o for e, o in kept.items() if e == epoch - 1} | {epoch: order}
            here = epochs == epoch
            items[here] = order[index[here] % self.size]
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
        self.share = share_of(settings.batch_size, settings.sample_group)
        self.from_files = any(
            isinstance(source, ImageSet) and isinstance(source.images, Reader)
            for source in self.sources.values()
        )
        self._ahead = dict[int, Future[list[dict[str, Any]]]]()

    def of_step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step; all ranks' are samples step B .. step B + B - 1.

        While it trains on them, threads read those of the next steps, if images come from files or
        are drawn, and for a GPU.
        """
        parts, ahead = self._index(step), self._ahead.pop(step, None)
        drawn = ahead.result() if ahead else self._drawn(step)
        if self.from_files or self.device.type == "cuda":
            steps = range(step + 1, step + 1 + AHEAD)
            self._ahead = {
                s: self._ahead.get(s) or reading_threads().submit(self._drawn, s) for s in steps
            }
        return [self._batch(step, *each) for each in zip(parts, drawn, strict=True)]

    def of_samples(self, step: int, index: Tensor) -> Batch:
        """A batch of these sample numbers, on the trainer's device."""
        return self._batch(step, index, self._read(step, index))

    def _index(self, step: int) -> list[Tensor]:
        """The sample numbers of each of this rank's micro-batches of a step."""
        start = step * self.settings.batch_size + ranks.number() * self.share
        index = torch.arange(start, start + self.share)
        return list(index.split(self.settings.micro_batch_size or self.share))

    def _drawn(self, step: int) -> list[dict[str, Any]]:
        """What each source gives for each micro-batch of a step, on the CPU.

        For a GPU its memory is pinned, so that a copy does not wait.
        """
        drawn = [self._read(step, index) for index in self._index(step)]
        if self.device.type != "cuda":
            return drawn
        return [{name: pinned(value) for name, value in part.items()} for part in drawn]

    def _read(self, step: int, index: Tensor) -> dict[str, Any]:
        """What each source gives for these sample numbers.

        Images that may be mirrored are so by a keyed choice for each step and sample.
        """
        found = {}
        for name, source in self.sources.items():
            items = self.items[name](index)
            if isinstance(source, ImageSet) and source.flip:
                keys = Keyed("train", self.settings.seed, step)
                found[name] = source.batch(items, keys.uniform("mirrored data", index) < 0.5)
            else:
                found[name] = source.batch(items)
        return found

    def _batch(self, step: int, index: Tensor, drawn: Mapping[str, Any]) -> Batch:
        data, trajectory = drawn.get("data"), drawn.get("trajectory")
        if data is not None:
            data = (data[0].to(self.device, non_blocking=True), data[1].to(self.device))
        if trajectory is not None:
            trajectory = trajectory.to(self.device)
        return Batch(
            index.to(self.device), data, trajectory, Keyed("train", self.settings.seed, step)
        )


def pinned(value: Any) -> Any:
    """What a source gives, with images and trajectories in pinned memory; a device's stay there."""
    if isinstance(value, Tensor):
        return value.pin_memory() if value.device.type == "cpu" else value
    if isinstance(value, Trajectory):
        return replace(value, states=pinned(value.states), predictions=pinned(value.predictions))
    return tuple(map(pinned, value)) if isinstance(value, tuple) else value


@cache
def reading_threads() -> ThreadPoolExecutor:
    """The threads that read the next steps' samples."""
    return ThreadPoolExecutor(AHEAD, thread_name_prefix="read")
