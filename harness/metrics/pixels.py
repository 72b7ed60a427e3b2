"""From samples to 8-bit pictures: latents are decoded, and one formula rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from harness.data.images import to_uint8
from harness.errors import UsageError
from harness.tasks import Task

AT_ONCE = 64
"""Pictures in a batch."""
DECODED_AT_ONCE = 8
"""Latents that are decoded at once: Stable Diffusion's decoder has layers of 67 MB for one."""


def floored_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8 as DiT's `sample_ddp.py` does: `floor(127.5 x + 128)`, clamped."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


ROUNDING: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "round": ("round(127.5 (x + 1))", to_uint8),
    "floor": ("floor(127.5 x + 128)", floored_uint8),
}
"""Formulas of 8 bits by the names that a task's YAML uses; all clamp to 0..255."""


def seen_as_latents(task: Task) -> bool:
    """Whether a task's feature network sees latents as they are, without rounding."""
    return task.latent and (task.own_classifier or task.spec.autoencoder is None)


def rounding_of(task: Task) -> Callable[[Tensor], Tensor] | None:
    """The formula of 8 bits before a task's own classifier; None for latents."""
    return None if seen_as_latents(task) else ROUNDING[task.spec.evaluation.rounding][1]


def rounding_name(task: Task) -> str:
    """The formula of 8 bits as a metric's identity names it.

    "uint8" alone is `round(127.5 (x + 1))`, clamped, before the task's own classifier.
    """
    if task.mixture or seen_as_latents(task):
        return "none"
    if task.own_classifier and task.spec.evaluation.rounding == "round":
        return "uint8"
    return formula_name(task)


def formula_name(task: Task) -> str:
    """The formula of 8 bits in full."""
    return f"uint8: {ROUNDING[task.spec.evaluation.rounding][0]}, clamped to 0..255"


def decoding_of(task: Task) -> dict[str, Any]:
    """What decides the images of latents, for identities; empty without an autoencoder."""
    spec = task.spec.autoencoder
    return {"decoding": spec.model_dump(mode="json", exclude={"folder"})} if spec else {}


class Pixels:
    """A task's samples as 8-bit pictures.

    Args:
        device: where latents are decoded.

    Raises UsageError if samples are latents and the task has no autoencoder, or a broken one.
    """

    def __init__(self, task: Task, device: torch.device):
        if task.latent and task.spec.autoencoder is None:
            raise UsageError(
                f"samples of task {task.spec.name} are latents, which are no 8-bit images: "
                "give the task an autoencoder that decodes them"
            )
        self._autoencoder = task.autoencoder(device)
        self._round = ROUNDING[task.spec.evaluation.rounding][1]

    def __call__(self, samples: Tensor) -> Tensor:
        """Pictures of samples [B, C, H, W]: uint8 [B, C', H', W']."""
        if self._autoencoder is None:
            return self._round(samples)
        parts = samples.split(DECODED_AT_ONCE)
        return torch.cat([self._round(self._autoencoder.decode(part)) for part in parts])

    def batches(self, samples: Tensor, size: int = AT_ONCE) -> Iterator[Tensor]:
        """Pictures of samples [n, C, H, W] in order, uint8 [B, C', H', W']; never all at once."""
        for part in samples.split(size):
            yield self(part)


def drawable(task: Task, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What makes uint8 pictures [n, 1 or 3, H, W] to look at from samples [n, C, H, W].

    Latents are decoded; without an autoencoder their first three channels are shown, each scaled by
    its range.
    """
    if task.latent and task.spec.autoencoder is None:
        return first_channels
    pixels = Pixels(task, device)
    return lambda samples: torch.cat([part.cpu() for part in pixels.batches(samples)])


def first_channels(samples: Tensor) -> Tensor:
    """The first one or three channels of samples [n, C, H, W], scaled by their range to uint8."""
    shown = samples.float()[:, : 3 if samples.shape[1] >= 3 else 1]
    low, high = shown.amin((0, 2, 3), keepdim=True), shown.amax((0, 2, 3), keepdim=True)
    return to_uint8((shown - low) / (high - low).clamp(min=1e-12) * 2 - 1)
