"""Calls of the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Done(NamedTuple):
    code: int
    out: str
    err: str


Harness = Callable[..., Done]
ARD = ("run", "--task", "tiny", "--method", "ard", "--num-steps", "2")


def sentence(done: Done, code: int) -> str:
    """The error of a refused command: one line on stderr, and nothing on stdout."""
    assert done.code == code
    assert done.out == ""
    assert done.err.startswith("harness: ")
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err
    return done.err.removeprefix("harness: ").strip()
