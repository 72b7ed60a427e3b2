"""A small convolutional classifier; its 64 penultimate features are the feature space of a task."""

from __future__ import annotations

from torch import Tensor, nn


class Classifier(nn.Module):
    """Three convolutions, of which two are followed by pooling, 64 features and a linear layer.

    Args:
        shape: [C, H, W] of the images.
        num_classes: number of logits.
    """

    def __init__(self, shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        channels, height, width = shape
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.GELU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.GELU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * (height // 4) * (width // 4), 64), nn.GELU(),
        )  # fmt: skip
        self.logits = nn.Linear(64, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] to features [B, 64]."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] to logits [B, classes]."""
        return self.logits(self.body(images))
