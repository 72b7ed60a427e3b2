"""Feature networks: from 8-bit images to features and logits."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.data.images import to_uint8
from harness.data.readers import Images
from harness.networks.classifier import Classifier


@torch.no_grad()
def classify(
    classifier: Classifier, images: Images, batch_size: int = 100
) -> tuple[Tensor, Tensor]:
    """Features and logits of images, which are rounded to 8 bits first.

    Args:
        images: [n, C, H, W] in [-1, 1].

    Returns:
        Features [n, 64] and logits [n, classes], float64 on the CPU.
    """
    features, logits = [], []
    for part in images.split(batch_size):
        rounded = to_uint8(part).to(next(classifier.parameters()).device).float() / 127.5 - 1
        found = classifier.features(rounded)
        features.append(found.double().cpu())
        logits.append(classifier.logits(found).double().cpu())
    return torch.cat(features), torch.cat(logits)
