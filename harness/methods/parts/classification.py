"""Training of the feature network, a classifier. It has no sampler and is not registered."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from harness.methods.base import Batch, Method, Problem, Update
from harness.methods.parts.options import OptimizerConfig
from harness.networks.classifier import Classifier


class Classification(Method):
    """Cross-entropy, `L = -log p(label | image)`."""

    class Config(OptimizerConfig):
        flip: float = Field(0.0, ge=0, le=1)
        """Share of images that are flipped left to right."""

    sources = frozenset({"data"})
    target = "data"
    needs_labels = True

    def __init__(
        self, config: Config, teacher: None, task: Problem, num_steps: int, total_steps: int
    ):
        self.config, network = config, Classifier(task.shape, task.num_classes)
        self.players = {"classifier": config.player(network, total_steps)}
        ema = self.players["classifier"].ema
        assert ema is not None
        self.student = ema.module

    def updates(self, step: int) -> Iterable[Update]:
        return [Update("classifier", self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.data is not None
        images, cond = batch.data
        logits = self.players["classifier"].module(self.augmented(images, batch))
        accuracy = (logits.argmax(1) == cond.classes).float().mean()
        return F.cross_entropy(logits, cond.classes), {"accuracy": accuracy}

    def augmented(self, images: Tensor, batch: Batch) -> Tensor:
        """Images [B, C, H, W], of which a random share is flipped."""
        mirrored = (batch.uniform("flip") < self.config.flip).view(-1, 1, 1, 1)
        return torch.where(mirrored, images.flip(-1), images)
