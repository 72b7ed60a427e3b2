"""What a sample is conditioned on. Floor 0."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Class labels of a batch.

    Attributes:
        labels: [B], int64; the number of classes itself is the null label of guidance and label dropout.
    """

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> Condition:
        return Condition(self.labels[index])

    def to(self, device: torch.device | str) -> Condition:
        return Condition(self.labels.to(device))

    def replaced(self, where: Tensor, label: int) -> Condition:
        """The same with `label` wherever the boolean mask [B] is true (label dropout; all true is the null condition)."""
        return Condition(torch.where(where, label, self.labels))


def balanced_labels(index: Tensor, num_classes: int) -> Condition:
    """Labels in turn: sample i has class i mod `num_classes`, so that any multiple of it is exactly balanced."""
    return Condition(index % num_classes)
