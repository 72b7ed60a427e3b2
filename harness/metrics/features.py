"""The task's own feature network: from 8-bit images, or latents, to features and logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness import ranks
from harness.data.images import to_uint8
from harness.data.readers import Images
from harness.networks.classifier import Classifier


@torch.no_grad()
def classify(
    classifier: Classifier,
    images: Images,
    batch_size: int = 100,
    rounded: Callable[[Tensor], Tensor] | None = to_uint8,
) -> tuple[Tensor, Tensor]:
    """Features and logits of images, which are rounded to 8 bits first.

    Args:
        images: [n, C, H, W] in [-1, 1], or latents.
        rounded: the formula of 8 bits; None leaves the numbers as they are.

    Returns:
        Features [n, 64] and logits [n, classes], float64 on the CPU.
    """
    device = next(classifier.parameters()).device

    def classified(part: Tensor) -> tuple[Tensor, Tensor]:
        seen = rounded(part).to(device).float() / 127.5 - 1 if rounded else part.to(device).float()
        found = classifier.features(seen)
        return found.double().cpu(), classifier.logits(found).double().cpu()

    features, logits = zip(*ranks.each(classified, images.split(batch_size)), strict=True)
    return torch.cat(features), torch.cat(logits)
