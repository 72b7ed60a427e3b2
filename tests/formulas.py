"""Closed formulas that counted compute must equal."""

from __future__ import annotations

from collections.abc import Iterable


def dit_macs(
    image_size: int,
    patch_size: int,
    in_channels: int,
    hidden_size: int,
    depth: int,
    num_heads: int,
    num_classes: int,
    learn_sigma: bool = False,
) -> int:
    """Multiply-adds of one sample through a DiT, from its layers' shapes."""
    tokens, d, pixels = (image_size // patch_size) ** 2, hidden_size, patch_size**2 * in_channels
    embed = tokens * pixels * d + 256 * d + d * d
    linear = tokens * (3 * d * d + d * d + 2 * 4 * d * d) + 6 * d * d
    attention = 2 * tokens**2 * d
    final = 2 * d * d + tokens * d * pixels * (2 if learn_sigma else 1)
    return embed + depth * (linear + attention) + final


def history_extra_macs(
    tokens: int, width: int, history_layers: int, visible_states: Iterable[int]
) -> int:
    """MACs that history adds to step distillation: `2 T^2 d N sum_q (visible_q - 1)`.

    Args:
        tokens, width: T tokens a state, width d.
        history_layers: N.
        visible_states: for each state, how many states it sees, itself included.
    """
    return 2 * tokens**2 * width * history_layers * sum(v - 1 for v in visible_states)


def text_macs(length: int, text_width: int, width: int, depth: int) -> int:
    """MACs of what rests on the text alone, once a sample: keys, values, and the mean's embedding.

    Args:
        length: outputs of the text encoder, each of `text_width` numbers.
        width, depth: width d and number of blocks of the network.
    """
    return depth * length * text_width * 2 * width + text_width * width


def cross_attention_macs(tokens: int, length: int, width: int, depth: int) -> int:
    """MACs of cross-attention in each pass: queries, products and the projection after them."""
    return depth * (2 * tokens * width**2 + 2 * tokens * length * width)
