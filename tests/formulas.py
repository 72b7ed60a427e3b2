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
