"""Closed formulas that counted compute must equal."""

from __future__ import annotations

from collections.abc import Iterable


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
