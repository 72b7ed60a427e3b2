"""Commands that many processes start at once: one makes the work, and nothing is made twice."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_scenarios import SCENARIOS, Place
from injection import Arm, Process, forked_children, nothing, slow_folder

LATE = 0.5
"""Seconds until a process sees what another one wrote."""
Making = Callable[[str], Place]


def at_once(made: Place, count: int, arm: Arm = nothing) -> list[int]:
    """The exit codes of processes that start the command of a place together."""
    logs = [made.folder / f"log {number}" for number in range(count)]
    started = [Process(made.words(), log, arm) for log in logs]
    codes = [process.wait() for process in started]
    for code, log in zip(codes, logs, strict=True):
        said = log.read_text()
        assert code == 0 or (code == 2 and "another process works on" in said), said
        log.unlink()
    assert 0 in codes
    return codes


def finished(made: Place) -> list[int]:
    """How often each run was finished, as its log says."""
    logs = [path.read_text() for path in made.work.glob("results/runs/*/run.log")]
    return [log.count(" is finished\n") for log in logs]


def test_two_processes_publish_at_once(place: Making) -> None:
    made = place("report")
    assert at_once(made, 2) == [0, 0]
    made.check()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "teacher"])
def test_many_processes_at_once(name: str, count: int, place: Making) -> None:
    made = place(name)
    at_once(made, count)
    made.check(f"{count} processes at once")
    assert set(finished(made)) <= {1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "sweep", "report", "encoding"])
def test_a_slow_network_folder(name: str, place: Making, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process has just written is not seen for a while."""
    made = place(name)
    arm = slow_folder(monkeypatch, made.work, LATE)
    time.sleep(LATE)  # so that the beginning is seen
    if made.scenario.forks:
        forked_children(monkeypatch, Path(os.devnull), arm)
    at_once(made, 4, arm)
    made.check("a slow folder")
