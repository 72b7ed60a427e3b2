"""Long sweeps: a driver's descriptors, threads and work do not grow with the number of runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.load import swept
from harness.runs import identity
from harness.runs.resolve import Resolved

RUN_ID = identity.run_id
CHILDREN = 8
"""Descriptors of the pipes of two children, which may be there or not when they are counted."""


@pytest.mark.parametrize("runs", [12, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_long_sweep_leaks_nothing(runs: int, tmp_path: Path) -> None:
    """A run's child and its pipe are gone when it has ended; its record alone stays in memory."""
    grown = swept(tmp_path, runs)
    early = grown.descriptors[: runs // 2]
    assert len(grown.descriptors) == runs
    assert max(grown.descriptors) <= max(early) + CHILDREN
    assert max(grown.threads) == max(grown.threads[: runs // 2])
    assert grown.megabytes[-1] - grown.megabytes[runs // 10] < 20 + 0.15 * runs


def test_each_run_of_a_sweep_is_named_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once more for each run that waits: a name is the hash of a whole setting."""
    named: list[Resolved] = []

    def run_id(resolved: Resolved) -> str:
        named.append(resolved)
        return RUN_ID(resolved)

    monkeypatch.setattr(identity, "run_id", run_id)
    counts = []
    for runs in (8, 24):
        named.clear()
        swept(tmp_path / str(runs), runs)
        counts.append(len(named))
    assert counts[1] <= 3.5 * counts[0]
