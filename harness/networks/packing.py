"""Latents as tokens that hold a square of them each, as FLUX's pipeline packs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from harness.networks.swapping import Swapped


def packed(x: Tensor, side: int) -> Tensor:
    """Latents [N, C, H, W] as tokens [N, (H / side) (W / side), C side^2], channel by channel.

    Raises ValueError if the side does not divide H and W.
    """
    if any(length % side for length in x.shape[-2:]):
        raise ValueError(
            f"latents are {tuple(x.shape[-2:])}, but a token holds {side} x {side} of them: "
            f"height and width must be multiples of {side}"
        )
    cut = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [N, C, rows, side, columns, side]
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, side: int, size: Sequence[int]) -> Tensor:
    """The latents [N, C, H, W] of tokens [N, T, C side^2]: the inverse of `packed`."""
    rows, columns = (length // side for length in size)
    cut = tokens.unflatten(2, (-1, side, side)).unflatten(1, (rows, columns))
    return cut.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class Packing(Swapped, nn.Module):
    """The linear layer from packed tokens, which takes latents and packs them."""

    side: int

    @property
    def proj(self) -> Any:
        """The layer that a `Backbone` names."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Latents [N, C, H, W] to tokens [N, T, d]."""
        return super().forward(packed(x, self.side))
