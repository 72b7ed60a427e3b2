"""Whether scenes follow their prompts, in the eyes of the task's detector.

A prompt is followed if the scene shows what it says and nothing else: these objects, so many of
each, in these colours, at these places. GenEval (Ghosh et al. 2023, arXiv 2310.11513) asks for the
first three likewise, but allows further objects except where it counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from harness.data.scene_prompts import Prompt
from harness.networks.detector import Found

PARTS = ("object", "count", "color", "position")
"""What is checked, one after the other."""


@dataclass(frozen=True)
class Thing:
    """An object that was found: its numbers, and pixels of its centre from left and top."""

    object: int
    colour: int
    x: float
    y: float


def things(found: Found) -> list[list[Thing]]:
    """The objects of each image."""
    rows = zip(*(x.tolist() for x in (found.objects, found.colours, found.x, found.y)), strict=True)
    return [[Thing(*each) for each in zip(*row, strict=True) if each[0] >= 0] for row in rows]


def checked(prompt: Prompt, seen: Sequence[Thing]) -> dict[str, bool]:
    """Which parts of a prompt a scene follows, by `PARTS`; what a prompt does not ask is true."""
    asked = {each.object: each for each in prompt.things}
    groups = {thing: [one for one in seen if one.object == thing] for thing in asked}
    present = all(groups.values()) and all(one.object in asked for one in seen)
    return {
        "object": present,
        "count": all(len(groups[thing]) == each.count for thing, each in asked.items()),
        "color": present
        and all(
            each.colour is None or all(one.colour == each.colour for one in groups[thing])
            for thing, each in asked.items()
        ),
        "position": prompt.relation is None
        or (present and _related(prompt.relation, *(g[0] for g in groups.values()))),
    }


def _related(relation: int, first: Thing, second: Thing) -> bool:
    """Whether the first is left of, right of, above or below the second, and that above all."""
    across, down = second.x - first.x, second.y - first.y
    along, beside = (across, down) if relation < 2 else (down, across)
    return (along if relation % 2 == 0 else -along) > abs(beside)


@dataclass(frozen=True)
class Reading:
    """What the detector reads in samples, beside what their prompts ask.

    Attributes:
        numbers: the prompts of the samples by number, [n].
        prompts: all prompts.
        seen: the objects of each sample.
    """

    numbers: Tensor
    prompts: Sequence[Prompt]
    seen: Sequence[Sequence[Thing]]

    @cached_property
    def checks(self) -> list[dict[str, bool]]:
        """`checked` of each sample."""
        asked = (self.prompts[number] for number in self.numbers.tolist())
        return [checked(prompt, seen) for prompt, seen in zip(asked, self.seen, strict=True)]

    @cached_property
    def followed(self) -> Tensor:
        """Whether all parts are followed, bool [n]."""
        return torch.tensor([all(found.values()) for found in self.checks])

    def share(self, category: str | None = None, held_out: bool | None = None) -> float:
        """The share of samples that follow their prompts; NaN if there are none.

        Args:
            category: one of `scene_prompts.CATEGORIES`; None is all.
            held_out: prompts that training never saw, or seen ones; None is both.
        """
        chosen = torch.tensor(
            [
                category in (None, prompt.category) and held_out in (None, prompt.held_out)
                for prompt in self.prompts
            ]
        )[self.numbers]
        return float(self.followed[chosen].double().mean())


def within_prompts(features: Tensor, numbers: Tensor) -> float:
    """Mean distance in features between two samples of one prompt; NaN without such a pair.

    Args:
        features: [n, d], float64.
        numbers: the prompts of the samples, [n].
    """
    means = []
    for number in numbers.unique():
        own = features[numbers == number]
        if len(own) > 1:
            means.append(torch.pdist(own).mean())
    return float(torch.stack(means).mean()) if means else float("nan")
