"""Modules of other libraries that read the text alone: a run of sampling calls them once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any

from torch import nn

from harness.diffusion.conditions import Condition
from harness.networks.swapping import Swapped, swap

NOTHING = Condition()


@dataclass
class Reading:
    """What a network and its modules share during a pass.

    Attributes:
        cond: the conditions of the pass.
        rows: the number N of inputs, for each of which the text is repeated.
    """

    cond: Condition = NOTHING
    rows: int = 0


class OfText(Swapped, nn.Module):
    """A module whose output rests on the text alone; conditions may keep it."""

    reading: Reading

    def forward(self, *inputs: Any) -> Any:
        """As the module itself."""
        compute = partial(super().forward, *inputs)
        return self.reading.cond.once((self, self.reading.rows), compute)


def read_once(model: nn.Module, patterns: Iterable[str], reading: Reading) -> None:
    """Changes the modules whose names match, as in `blocks.*.to_k`, so that conditions keep."""
    for name, module in list(model.named_modules()):
        if any(fnmatch(name, pattern) for pattern in patterns):
            swap(module, OfText, reading=reading)
