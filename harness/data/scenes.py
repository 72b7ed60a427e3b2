"""Scenes of real digit images and plain shapes, 32 x 32 in colour, drawn from their prompts.

A scene holds up to four objects of 12 x 12 pixels, one in each quarter of the canvas. Each is
shifted by up to 4 pixels. Digits are scikit-learn's. A scene is a function of its seed and number,
so a set of a million of them needs no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.data.images import IMAGE_SETS, ImageSet, Split, digits
from harness.data.readers import Reader
from harness.data.scene_prompts import (
    COLOURS,
    OBJECTS,
    Prompt,
    encoded,
    judged_prompts,
    training_prompts,
    unseen_colour,
)
from harness.diffusion.randomness import Keyed
from harness.errors import UsageError
from harness.files import digest, tensors_digest

SIDE, GLYPH, CELL = 32, 12, 16
"""Pixels of the canvas, of an object, and of a quarter's side."""
RGB = torch.tensor(
    [[230, 40, 40], [40, 200, 60], [60, 90, 240], [235, 215, 50], [180, 60, 210]],
    device="cpu",
)
"""The colours, in the order of `COLOURS`."""
TRAINING, REFERENCE, REAL = 2**20, 20_000, 5_000
"""Scenes of training, of the reference of FID, and held out."""
PROMPTS, JUDGED = 12_288, 250
"""Prompts of training and of evaluation."""
VERSION = 1
"""Raised with every change of what is drawn."""


@dataclass(frozen=True)
class Layout:
    """What scenes hold, by slot: [B, 4] each, int64.

    Attributes:
        objects: places in `OBJECTS`; -1 is an empty slot.
        colours: places in `COLOURS`.
        top, left: the pixel where the object's square begins.
        variant: a uniform number in (0, 1), float64, which chooses the glyph.
    """

    objects: Tensor
    colours: Tensor
    top: Tensor
    left: Tensor
    variant: Tensor


@cache
def glyphs(held_out: bool) -> tuple[Tensor, ...]:
    """The glyphs of each object, uint8 [variants, 12, 12] each.

    Args:
        held_out: whether digits are those of the held-out images.
    """
    split = digits(0)
    images = split.held_out if held_out else split.train
    small = (images.images[:] + 1) / 2
    large = F.interpolate(small, size=(GLYPH, GLYPH), mode="bilinear")
    masks = (255 * large.squeeze(1)).round().clamp(0, 255).to(torch.uint8)
    return *(masks[images.labels == number] for number in range(10)), *_shapes()


def _shapes() -> tuple[Tensor, ...]:
    """Circles, squares, triangles and crosses of four sizes each."""
    fine = 8
    y, x = (np.mgrid[: GLYPH * fine, : GLYPH * fine] + 0.5) / fine - GLYPH / 2
    found = []
    for inside in (
        lambda r: x**2 + y**2 <= r**2,
        lambda r: np.maximum(abs(x), abs(y)) <= 0.86 * r,
        lambda r: (abs(x) <= (y + r) / 2) & (y <= 0.8 * r),
        lambda r: (np.minimum(abs(x), abs(y)) <= 0.3 * r) & (np.maximum(abs(x), abs(y)) <= r),
    ):
        masks = [
            inside(radius).reshape(GLYPH, fine, GLYPH, fine).mean((1, 3))
            for radius in (4.5, 5.0, 5.5, 6.0)
        ]
        found.append(torch.from_numpy(np.stack(masks) * 255).round().to(torch.uint8))
    return tuple(found)


@cache
def _bank(held_out: bool) -> tuple[Tensor, Tensor, Tensor]:
    """All glyphs [total, 12, 12], and the first one [objects] and number [objects] of each."""
    found = glyphs(held_out)
    count = torch.tensor([len(each) for each in found])
    return torch.cat(found), count.cumsum(0) - count, count


@cache
def _allowed(everything: bool) -> tuple[Tensor, Tensor]:
    """The colours [objects, 5] that each object may have, in front, and their number [objects]."""
    allowed = [
        [c for c in range(len(COLOURS)) if everything or not unseen_colour(thing, c)]
        for thing in range(len(OBJECTS))
    ]
    padded = [(each + each)[: len(COLOURS)] for each in allowed]
    return torch.tensor(padded), torch.tensor([len(each) for each in allowed])


def arranged(
    prompts: dict[str, Tensor], keyed: Keyed, index: Tensor, everything: bool = False
) -> Layout:
    """Layouts of scenes for prompts [B] (`encoded`), keyed by scene number [B].

    Args:
        everything: whether objects of any colour may have those that training never shows.
    """
    objects, colours, relation = (prompts[name] for name in ("objects", "colours", "relation"))
    drawn = keyed.uniform("layout", index, (5, 4))
    cell = drawn[:, 0].argsort(1)
    row, column = cell // 2, cell % 2
    side = (drawn[:, 0, 0] < 0.5).long()  # the row, or the column, that a related pair shares
    for place, (rows, columns) in enumerate(
        [((side, side), (0, 1)), ((side, side), (1, 0)), ((0, 1), (side, side)),
         ((1, 0), (side, side))]
    ):  # fmt: skip
        told = (relation == place)[:, None]
        pair = [
            torch.stack([torch.as_tensor(v).expand_as(side) for v in values], 1)
            for values in (rows, columns)
        ]
        row[:, :2] = torch.where(told, pair[0], row[:, :2])
        column[:, :2] = torch.where(told, pair[1], column[:, :2])
    choices, number = _allowed(everything)
    known = objects.clamp(min=0)
    free = (drawn[:, 1] * number[known]).long()
    colours = torch.where(colours < 0, choices[known, free], colours)
    top, left = (
        CELL * at + (drawn[:, k] * (CELL - GLYPH + 1)).long() for k, at in ((2, row), (3, column))
    )
    return Layout(objects, colours, top, left, drawn[:, 4])


def drawn(layout: Layout, held_out: bool) -> Tensor:
    """The images of layouts, [B, 3, 32, 32], float32 in [-1, 1] with 8 bits.

    Later objects cover earlier ones where both have ink.
    """
    device = layout.objects.device
    bank, first, count = (x.to(device) for x in _bank(held_out))
    rgb, at = RGB.to(device).float(), torch.arange(GLYPH, device=device)
    canvas = torch.zeros(len(layout.objects), 3, SIDE * SIDE, device=device)
    for slot in range(layout.objects.shape[1]):
        there, thing = layout.objects[:, slot] >= 0, layout.objects[:, slot].clamp(min=0)
        chosen = bank[first[thing] + (layout.variant[:, slot] * count[thing]).long()]
        ink = (chosen.flatten(1) * there[:, None]).unsqueeze(1).float() / 255
        rows, columns = layout.top[:, slot, None] + at, layout.left[:, slot, None] + at
        place = (SIDE * rows[:, :, None] + columns[:, None, :]).flatten(1)
        place = place.unsqueeze(1).expand(-1, 3, -1)
        under = canvas.gather(2, place)
        colour = rgb[layout.colours[:, slot].clamp(min=0)].unsqueeze(2)
        canvas.scatter_(2, place, torch.lerp(under, colour.expand_as(under), ink))
    canvas = canvas.view(-1, 3, SIDE, SIDE)
    return canvas.round() / 127.5 - 1


class Scenes(Reader):
    """Scenes by number; scene i shows prompt i mod their count.

    Args:
        prompts: what the scenes show.
        seed: scenes of another seed are other ones.
        count: their number.
        held_out: whether digits are held-out images, and objects of any colour may have all.
    """

    def __init__(self, prompts: tuple[Prompt, ...], seed: int, count: int, held_out: bool):
        self.prompts, self.seed, self.held_out = prompts, seed, held_out
        self.labels, self.shape = torch.arange(count) % len(prompts), (count, 3, SIDE, SIDE)
        self._told = encoded(prompts)

    def layout(self, items: Tensor) -> Layout:
        """What scenes [B] hold."""
        told = {name: value[self.labels[items]] for name, value in self._told.items()}
        return arranged(told, Keyed("scenes", self.seed), items)

    def views(self, items: Tensor, mirrored: Tensor | bool) -> Tensor:
        if not isinstance(mirrored, bool) or mirrored:
            raise UsageError("a mirrored scene contradicts its prompt: leave data.flip out")
        return drawn(self.layout(items), self.held_out)

    def content(self) -> str:
        bank = tensors_digest({"glyphs": _bank(self.held_out)[0], "rgb": RGB})
        texts = [prompt.text for prompt in self.prompts]
        return digest([VERSION, self.seed, len(self), self.held_out, bank, texts])


def scenes(seed: int) -> Split:
    """Scenes with prompts; the reference and the held-out scenes have those of evaluation."""
    training, judged = training_prompts(PROMPTS), judged_prompts(JUDGED)
    parts = (
        Scenes(training, 3 * seed, TRAINING, False),
        Scenes(judged, 3 * seed + 1, REAL, True),
        Scenes(judged, 3 * seed + 2, REFERENCE, False),
    )
    return Split(*(ImageSet(part, part.labels) for part in parts))


IMAGE_SETS["scenes"] = scenes
