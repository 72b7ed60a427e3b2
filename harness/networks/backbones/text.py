"""The widths of a text encoder's outputs that a network takes, read from its description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.networks.backbones.diffusers import class_of

TEXT = ("caption_channels", "cap_feat_dim", "joint_attention_dim")
"""diffusers' names of the width of the text in a config."""
POOLED = "pooled_projection_dim"


def text_widths(network: Mapping[str, Any]) -> tuple[int, int]:
    """The widths of text and pooled vector; 0 for what the network does not take."""
    options = dict(network)
    if options.pop("backbone", "dit") == "dit":
        return options.get("text_width", 0), 0
    _, config = class_of(options)
    return next((config[name] for name in TEXT if config.get(name)), 0), config.get(POOLED) or 0
