"""Errors, each with the exit code of the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

MOST_NAMED = 200
"""Characters of an unknown name that are compared with known ones."""
MOST_SHOWN = 2000
"""Characters of an error that are shown; one that quotes a large value is cut."""


class HarnessError(Exception):
    """A problem in one sentence: what is wrong, where, and what would be right.

    Attributes:
        told: whether another rank of the run prints it.
    """

    exit_code = 3
    told = False


class UsageError(HarnessError):
    """A wrong name, value, file or config."""

    exit_code = 2


class CheckFailed(HarnessError):
    """A measured value differs from what it should be."""

    exit_code = 1


class RunFailed(HarnessError):
    """A run failed; its record has the reason."""

    exit_code = 3


class Busy(HarnessError):
    """Another process works on the same run."""

    exit_code = 2


class Interrupted(HarnessError):
    """A signal stopped a run after it wrote a checkpoint; the same command resumes it."""

    exit_code = 130


class RankLost(HarnessError):
    """Another rank of the run has ended; the same command resumes it."""

    exit_code = 3


@contextmanager
def standing_in(place: str) -> Iterator[None]:
    """Inside, a UsageError names a place, such as a file, unless it does already."""
    try:
        yield
    except UsageError as error:
        if place in str(error):
            raise
        raise UsageError(f"{place}: {error}") from error


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> UsageError:
    """The error for a name that is not in `known`; it lists near names, or all if none is near."""
    known, name = sorted(known), name[:MOST_NAMED]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known) or 'none'}"
    return UsageError(f"unknown {kind} {name!r}{f' in {where}' if where else ''}; {hint}")


def printable(text: str) -> str:
    """A text on one line, in which what does not print stands as in Python's `repr`.

    So a name from outside holds no line break, no escape sequence of a terminal, and nothing that
    turns the direction of writing.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def shown(value: object, most: int = 200) -> str:
    """A value in an error, cut short."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def sentence(text: str) -> str:
    """What a terminal shows of an error: printable, and cut where it quotes too much."""
    shown = printable(text[: MOST_SHOWN + 1])
    return shown if len(text) <= MOST_SHOWN else f"{shown[:MOST_SHOWN]} ..."
