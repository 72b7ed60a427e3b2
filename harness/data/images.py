"""Image sets: real images in [-1, 1] with labels, split for training and as held-out floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.conditions import Condition, Conditions
from harness.errors import unknown


@dataclass(frozen=True)
class ImageSet:
    """Real images.

    Attributes:
        images: [n, C, H, W], float32 in [-1, 1].
        labels: [n], int64: of a class, or of a prompt among `conditions`.
        conditions: what the labels mean; None is classes.
    """

    images: Tensor
    labels: Tensor
    conditions: Conditions | None = None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, items: Tensor) -> tuple[Tensor, Condition]:
        """Images [B, C, H, W] and conditions of these items."""
        return self.images[items], self.of(items)

    def of(self, items: Tensor) -> Condition:
        """Conditions of these items."""
        return self.conditions.of(self.labels[items]) if self.conditions else Condition(self.labels[items])


@dataclass(frozen=True)
class Split:
    """What the teacher and the feature network may see (also the reference of FID), and what nobody sees in training."""

    train: ImageSet
    held_out: ImageSet


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] rounded to 8 bits, as a saved file holds them; generated and real ones alike. uint8, same shape."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def digits(seed: int) -> Split:
    """scikit-learn's 1,797 handwritten digits (8 x 8, 17 grey levels), split 80/20, stratified by class: 1,437 and 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    images = torch.from_numpy(source.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(source.target).long()
    train, held_out = train_test_split(torch.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    return Split(ImageSet(images[train], labels[train]), ImageSet(images[held_out], labels[held_out]))


IMAGE_SETS: dict[str, Callable[[int], Split]] = {"digits": digits}


def load_split(name: str, seed: int) -> Split:
    """A known image set by name. Raises UsageError for an unknown one."""
    if name not in IMAGE_SETS:
        raise unknown("image set", name, IMAGE_SETS)
    return IMAGE_SETS[name](seed)
