"""Commands that are killed anywhere lose nothing: the same command goes on and ends the same."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from fault_scenarios import SCENARIOS, Place
from injection import (
    Arm,
    die,
    forked_children,
    killed_at,
    killed_in_step,
    killed_in_write,
    once,
    watch,
)

ALONE = [name for name, scenario in SCENARIOS.items() if not scenario.forks]
STRIDES = {"run": 6, "teacher": 4, "evaluation": 4}
KILLED = (-signal.SIGKILL, -signal.SIGXFSZ)
"""Exit codes of processes that died, by SIGXFSZ in the middle of a write."""
Making = Callable[[str], Place]


def test_a_run_that_is_killed_again_and_again(
    place: Making, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tox -e slow` kills at every change of files, and some hundred times more."""
    made = place("run")
    arms = [
        killed_at(made.work, 12),
        killed_in_step(monkeypatch, 1),
        killed_in_write(20_000),
        killed_at(made.work, 30),
    ]
    for arm in arms:
        assert made.start(arm) in KILLED, made.log.read_text()
    made.check()


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_killed_before_every_change_of_files(name: str, place: Making) -> None:
    """Of commands that take longest, before some of them."""
    made = place(name)
    kills = range(1, made.changes() + 1, STRIDES.get(name, 1))
    for number in kills:
        made.reset()
        assert made.start(killed_at(made.work, number)) in KILLED, made.log.read_text()
        made.check(f"killed before change {number}")
    print(f"\n{name}: {len(kills)} kills")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "teacher", "encoding", "evaluation"])
def test_killed_at_random(name: str, place: Making, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step, in the middle of a write, or between changes, again and again."""
    made, dice, kills = place(name), random.Random(name), 0
    for chain in range(3):
        made.reset()
        for _ in range(6):
            arm = dice.choice(
                [
                    killed_in_step(monkeypatch, dice.randrange(4)),
                    killed_in_write(2 ** dice.randrange(6, 17)),
                    killed_at(made.work, dice.randint(1, 30)),
                ]
            )
            code = made.start(arm)
            assert code in (0, *KILLED), made.log.read_text()
            kills += code != 0
        made.check(f"chain {chain}")
    print(f"\n{name}: {kills} kills")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sweep", "search"])
def test_a_child_that_is_killed_is_started_again(
    name: str, place: Making, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made, marks = place(name), tmp_path / "marks"
    marks.mkdir()
    for number in range(1, 100, 16):
        made.reset()
        arm = once(marks / f"{number}", killed_at(made.work, number))
        with monkeypatch.context() as patch:
            forked_children(patch, Path(os.devnull), arm)
            made.check(f"child killed before change {number}")
    print(f"\n{name}: {len(range(1, 100, 16))} kills of a child")


def parent_killed_at(folder: Path, number: int) -> Arm:
    """SIGKILL for the parent of a process before its change of files."""

    def before(count: int, event: str) -> None:
        if count == number:
            os.kill(os.getppid(), signal.SIGKILL)

    return lambda: watch(folder, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sweep", "search"])
def test_a_driver_that_is_killed_while_its_child_works(
    name: str, place: Making, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The child then stops by itself, and the next driver waits for it."""
    made, kills = place(name), 0
    for number in range(1, 90, 12):
        made.reset()
        with monkeypatch.context() as patch:
            arm = parent_killed_at(made.work, number)
            forked_children(patch, Path(os.devnull), arm)
            kills += made.start() in KILLED
        made.check(f"driver killed at change {number} of its child")
    print(f"\n{name}: {kills} kills of the driver")
    assert kills > 4


@pytest.mark.slow
def test_a_search_that_is_killed_before_a_statement(place: Making, tmp_path: Path) -> None:
    """Of SQL, so that a trial is half asked for or half told."""
    made, total = place("search"), tmp_path / "statements"

    def before_statement(act: Callable[[int], Any]) -> Arm:
        count = iter(range(1, 10**6))
        return lambda: sqlalchemy.event.listen(
            sqlalchemy.engine.Engine, "before_cursor_execute", lambda *args: act(next(count))
        )

    assert made.start(before_statement(lambda count: total.write_text(str(count)))) == 0
    kills = range(1, int(total.read_text()) + 1, 12)
    for number in kills:
        made.reset()
        arm = before_statement(lambda count, number=number: die() if count == number else None)
        assert made.start(arm) in KILLED, made.log.read_text()
        made.check(f"killed before statement {number}")
    print(f"\nsearch: {len(kills)} kills")
