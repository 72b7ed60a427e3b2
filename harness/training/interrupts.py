"""Signals during training: a step finishes and a checkpoint is written before the run stops."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Inside, SIGINT and SIGTERM only add their number to the list that is yielded.

    A second SIGINT raises KeyboardInterrupt at once. Outside the main thread nothing changes.
    """
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
