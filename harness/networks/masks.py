"""Block masks: which states of a trajectory a state attends to, and attention under them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Visible = Callable[[int], tuple[int, ...]]
"""From a query block (0 = noise) to its visible key blocks, in ascending order, itself last."""


def causal(query: int) -> tuple[int, ...]:
    """The paper's mask M4: all states so far."""
    return tuple(range(query + 1))


def window(depth: int) -> Visible:
    """The paper's mask M2: itself and the `depth` states before; depth 0 is M1, the diagonal."""
    return lambda query: tuple(range(max(0, query - depth), query + 1))


def keep_first(query: int) -> tuple[int, ...]:
    """The paper's mask M3: itself and the noise."""
    return (0, query) if query else (0,)


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: int,
    visible: Visible,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Attention of each state's tokens on the tokens of its visible states.

    Args:
        q: queries [B, S, heads, T, head width] of states first .. first + S - 1.
        k, v: keys and values of all states so far [B, first + S, heads, T, head width].
        mask: mask of a state's own keys, [B S or 1, heads or 1, T or 1, T]; it holds for the keys
            of earlier states too.
        options: further arguments of `scaled_dot_product_attention`.

    Returns:
        Attended values of the shape of q.
    """

    def keys(x: Tensor, blocks: tuple[int, ...]) -> Tensor:
        chosen = (
            x[:, blocks[0] : blocks[-1] + 1]
            if len(blocks) == blocks[-1] - blocks[0] + 1
            else x[:, list(blocks)]
        )
        return chosen.transpose(1, 2).flatten(2, 3)

    def of_state(i: int, blocks: int) -> Tensor | None:
        if mask is None:
            return None
        own = mask if len(mask) == 1 else mask.unflatten(0, q.shape[:2])[:, i]
        return own.repeat(1, 1, 1, blocks)

    outputs = []
    for i in range(q.shape[1]):
        blocks = visible(first + i)
        outputs.append(
            F.scaled_dot_product_attention(
                q[:, i], keys(k, blocks), keys(v, blocks), of_state(i, len(blocks)), **options
            )
        )
    return torch.stack(outputs, 1)


def sum_blocks(sums: Tensor, first: int, visible: Visible) -> Tensor:
    """What each state sees under linear attention: the sums of its visible states, added up.

    Args:
        sums: sums of all states so far [B, first + S, ...]; see `linear_attention.summed`.

    Returns:
        The sums for states first .. first + S - 1, [B, S, ...].
    """
    states = range(first, sums.shape[1])
    return torch.stack([sums[:, list(visible(i))].sum(1) for i in states], 1)
