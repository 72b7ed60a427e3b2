"""Training of the judge of scenes, a detector. It has no sampler and is not registered."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from harness.data.scene_prompts import COLOURS, OBJECTS
from harness.data.scenes import GLYPH, SIDE, Layout, drawn
from harness.methods.base import Batch, Method, Problem, Update
from harness.methods.parts.options import OptimizerConfig
from harness.networks.detector import THRESHOLD, Detector, marks


class Detection(Method):
    """Marks, objects and colours at once, on scenes that nothing else uses.

        L = BCE(marks) + CE(object) + CE(colour), the last two where a centre's mark is over 0.4

    A scene has none to four objects of any colour, each further from the middle of its quarter than
    in the task's scenes. Half of the images get blur, and all get noise and another brightness.
    """

    class Config(OptimizerConfig):
        noise: float = Field(0.3, ge=0, le=2)
        """Largest standard deviation of the added noise, where images lie in [-1, 1]."""
        blur: float = Field(0.5, ge=0, le=1)
        """Share of blurred images."""

    sources = frozenset()
    target = "data"

    def __init__(
        self, config: Config, teacher: None, task: Problem, num_steps: int, total_steps: int
    ):
        self.config = config
        network = Detector(task.shape, len(OBJECTS), len(COLOURS))
        self.players = {"detector": config.player(network, total_steps)}
        ema = self.players["detector"].ema
        assert ema is not None
        self.student = ema.module

    def updates(self, step: int) -> Iterable[Update]:
        return [Update("detector", self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        layout = self.layout(batch)
        images = self.augmented(drawn(layout, held_out=False), batch)
        network = self.players["detector"].module
        logits = network(images)
        centre, objects, colours = logits.float().split((1, len(OBJECTS), len(COLOURS)), 1)
        there = layout.objects >= 0
        x, y = layout.left + GLYPH / 2, layout.top + GLYPH / 2
        wanted = marks(x, y, there, *logits.shape[2:])
        mark, owner = wanted.max(1)
        loss = F.binary_cross_entropy_with_logits(centre.squeeze(1), mark) * 10
        near = (mark > THRESHOLD).float()
        for found, names in ((objects, layout.objects), (colours, layout.colours)):
            named = names.clamp(min=0).gather(1, owner.flatten(1)).view_as(owner)
            entropy = F.cross_entropy(found, named, reduction="none")
            loss = loss + (entropy * near).sum() / near.sum().clamp(min=1)
        return loss, {"detection": loss.detach()}

    def layout(self, batch: Batch) -> Layout:
        """Scenes [B] of none to four objects, one in each quarter."""
        numbers = batch.randomness.uniform("scene", batch.index, (7, 4))
        kept = numbers[:, 0] < numbers[:, 5, :1]  # any number of objects is as likely
        objects = (numbers[:, 1] * len(OBJECTS)).long()
        quarter = torch.arange(4, device=batch.index.device)
        free = SIDE - GLYPH
        top, left = (
            (16 * at - 3 + (numbers[:, k] * 11).long()).clamp(0, free)
            for k, at in ((2, quarter // 2), (3, quarter % 2))
        )
        return Layout(
            torch.where(kept, objects, -1),
            (numbers[:, 4] * len(COLOURS)).long(),
            top,
            left,
            numbers[:, 6],
        )

    def augmented(self, images: Tensor, batch: Batch) -> Tensor:
        """Images [B, C, H, W] with blur, another brightness and noise."""
        kernel = images.new_tensor([0.25, 0.5, 0.25])
        weight = (kernel[:, None] * kernel).expand(images.shape[1], 1, 3, 3)
        soft = F.conv2d(
            F.pad(images, (1, 1, 1, 1), mode="replicate"), weight, groups=images.shape[1]
        )
        blurred = (batch.uniform("blur") < self.config.blur).view(-1, 1, 1, 1)
        images = torch.where(blurred, soft, images)
        bright = (0.7 + 0.5 * batch.uniform("bright")).float().view(-1, 1, 1, 1)
        images = (images + 1) * bright - 1
        deviation = (self.config.noise * batch.uniform("deviation")).float().view(-1, 1, 1, 1)
        return images + deviation * batch.normal("noise", images.shape[1:])
