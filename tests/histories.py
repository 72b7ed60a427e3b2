"""Passes through networks with history."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.networks.history import EMPTY, Cache


def in_parts(
    network: Any, x: Tensor, t: Tensor, cond: Condition, cuts: list[int]
) -> tuple[Tensor, Cache]:
    """Outputs of states that go through in consecutive calls, `cuts` states each."""
    cache, outputs = EMPTY, []
    for part, time in zip(x.split(cuts, 1), t.split(cuts, 1), strict=True):
        output, cache = network(part, time, cond, cache)
        outputs.append(output)
    return torch.cat(outputs, 1), cache
