"""A transformer with its own text encoder, so that both are trained together.

A description holds `encoder`, the arguments of `TextEncoder`, and `network`, a description whose
`text_width` is the encoder's. The text of its conditions is tokens [B, length], int64.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.errors import UsageError
from harness.networks.backbones import dit
from harness.networks.backbones.base import Backbone
from harness.networks.text import TextEncoder


def check(options: Mapping[str, Any]) -> None:
    """Raises UsageError unless both networks are described."""
    if options.keys() != {"encoder", "network"} or not isinstance(options["network"], Mapping):
        raise UsageError("network: backbone prompted needs encoder and network, and nothing else")
    dit.check(options["network"])


def build(options: Mapping[str, Any], scalars: Sequence[str], extra_channels: int) -> Prompted:
    """Both networks from their descriptions. Raises UsageError if one does not fit."""
    return Prompted(
        TextEncoder(**options["encoder"]), dit.build(options["network"], scalars, extra_channels)
    )


def depth_of(options: Mapping[str, Any]) -> int:
    """The number of blocks of a description."""
    return dit.depth_of(options["network"])


class Prompted(Backbone):
    """A text encoder before a transformer."""

    def __init__(self, encoder: TextEncoder, network: Backbone):
        super().__init__()
        self.encoder, self.network, self.width = encoder, network, network.width

    def read(self, cond: Condition) -> Condition:
        """The conditions with the encoder's outputs in place of tokens."""
        assert cond.text is not None
        assert cond.text_mask is not None
        text = cond.once(self.encoder, lambda: self.encoder(cond.text, cond.text_mask))
        return replace(cond, text=text)

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        return self.network.blocks

    @property
    def attentions(self) -> Sequence[nn.Module]:
        return self.network.attentions

    @property
    def head(self) -> nn.Module:
        return self.network.head

    @property
    def patch_embedding(self) -> nn.Module:
        return self.network.patch_embedding

    def forward(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        return self.network(x, time, self.read(cond))

    def features(
        self, x: Tensor, time: Tensor, cond: Condition, depth: int | None = None
    ) -> tuple[Iterable[Tensor], Tensor]:
        return self.network.features(x, time, self.read(cond), depth)

    def reuse(
        self, x: Tensor, time: Tensor, cond: Condition, lowest: int, added: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.network.reuse(x, time, self.read(cond), lowest, added)
