"""What can go wrong, with the exit code that the command line gives it. Floor 0: imports nothing of the harness."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HarnessError(Exception):
    """A problem that is told in one sentence: what, where, what would be right."""

    exit_code = 3


class UsageError(HarnessError):
    """A wrong name, value, file or config."""

    exit_code = 2


class CheckFailed(HarnessError):
    """A measured value is not what it should be."""

    exit_code = 1


class RunFailed(HarnessError):
    """A run could not be finished; its record says why."""

    exit_code = 3


class Busy(HarnessError):
    """Another worker is at the same run."""

    exit_code = 2


class NotComparable(HarnessError):
    """Two metrics with different identities were asked to share a column."""

    exit_code = 4


class Interrupted(HarnessError):
    """A run was stopped by a signal after writing a checkpoint; asking for it again resumes it."""

    exit_code = 130


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> UsageError:
    """The error for a name that is not among `known`: it lists the near ones, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known) or 'none'}"
    return UsageError(f"unknown {kind} {name!r}{f' in {where}' if where else ''}; {hint}")
