"""A small detector, which finds objects on a canvas, and says what and of which colour they are.

It marks the centre of each object in a grid of 4-pixel cells, as CenterNet does (Zhou et al. 2019,
arXiv 1904.07850), and names object and colour there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 4
"""Pixels of a cell's side."""
MOST = 6
"""Objects that are looked for."""
THRESHOLD = 0.4
"""Mark of a centre from which an object counts; a centre in a cell's corner has 0.68."""
SPREAD = 0.8
"""Standard deviation of a mark around its centre, in cells."""


@dataclass(frozen=True)
class Found:
    """Objects in images, the surest first.

    Attributes:
        objects, colours: their numbers [B, 6], int64; -1 where there is none.
        x, y: pixels of their centres from the left and from the top, [B, 6].
    """

    objects: Tensor
    colours: Tensor
    x: Tensor
    y: Tensor


def marks(x: Tensor, y: Tensor, there: Tensor, rows: int, columns: int) -> Tensor:
    """What the first logit's sigmoid should be, [B, S, rows, columns] for each object.

    Args:
        x, y: pixels of centres [B, S].
        there: which of them are objects, [B, S].
    """
    at = [torch.arange(n, device=x.device) + 0.5 for n in (rows, columns)]
    down = (y / STRIDE)[:, :, None] - at[0]
    across = (x / STRIDE)[:, :, None] - at[1]
    squares = down.square()[:, :, :, None] + across.square()[:, :, None, :]
    return torch.exp(-squares / (2 * SPREAD**2)) * there[:, :, None, None]


class Detector(nn.Module):
    """Five convolutions to features of each cell, and a linear map to marks, objects and colours.

    Args:
        shape: [C, H, W] of the images.
        objects, colours: how many kinds there are.
    """

    width = 96

    def __init__(self, shape: tuple[int, int, int], objects: int, colours: int):
        super().__init__()
        self.kinds = objects, colours
        self.body = nn.Sequential(
            nn.Conv2d(shape[0], 32, 3, padding=1), nn.GELU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.GELU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.GELU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 96, 3, padding=1), nn.GELU(),
            nn.Conv2d(96, self.width, 3, padding=1), nn.GELU(),
        )  # fmt: skip
        self.head = nn.Conv2d(self.width, 1 + objects + colours, 1)

    def features(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] to features [B, 96], the mean over cells."""
        return self.body(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] to logits [B, 1 + objects + colours, H / 4, W / 4]."""
        return self.head(self.body(images))

    @torch.no_grad()
    def find(self, images: Tensor) -> Found:
        """The objects in images [B, C, H, W] in [-1, 1].

        Again and again the strongest mark is taken, and the eight cells around it are cleared.
        """
        marks, objects, colours = self(images).float().split((1, *self.kinds), 1)
        marks = marks.squeeze(1).sigmoid()
        batch, (rows, columns) = torch.arange(len(marks), device=marks.device), marks.shape[1:]
        padded, found = F.pad(marks, (1, 1, 1, 1)), []
        near = torch.arange(3, device=marks.device)
        for _ in range(MOST):
            strongest, place = marks.flatten(1).max(1)
            row, column = place // columns, place % columns
            down, across = row[:, None, None] + near[:, None], column[:, None, None] + near
            weights = padded[batch[:, None, None], down, across]
            total = weights.sum((1, 2)).clamp(min=1e-9)
            y = ((down - 0.5) * weights).sum((1, 2)) / total * STRIDE
            x = ((across - 0.5) * weights).sum((1, 2)) / total * STRIDE
            there = strongest >= THRESHOLD
            names = [
                torch.where(there, logits[batch, :, row, column].argmax(1), -1)
                for logits in (objects, colours)
            ]
            found.append((*names, x, y))
            padded = padded.clone()
            padded[batch[:, None, None], down, across] = 0
            marks = padded[:, 1 : rows + 1, 1 : columns + 1]
        return Found(*(torch.stack(part, 1) for part in zip(*found, strict=True)))
