"""Threads are configured before torch, shared among children, and other programs are noticed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import machine
from harness.machine import busy_cores, busy_note, configure_threads, peak_flops

BEFORE = """cpu  300 0 100 1000 10 0 0 0 0 0
cpu0 100 0 50 500 5 0 0 0 0 0
cpu1 200 0 50 500 5 0 0 0 0 0
cpu10 7 0 0 0 0 0 0 0 0 0
intr 5 4 3
"""
AFTER = """cpu  370 0 105 1100 15 0 0 10 0 0
cpu0 120 0 55 560 5 0 0 15 0 0
cpu1 250 0 50 540 15 0 0 0 50 0
cpu10 8 0 0 0 0 0 0 0 0 0
intr 5 4 3
"""


def test_the_peak_of_a_card_is_found_by_words_in_its_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("cpu") is None


def test_busy_cores_are_those_that_are_not_idle() -> None:
    assert busy_cores(BEFORE, AFTER, {0}) == pytest.approx(0.4)  # 20 + 5 + 15 of 100 ticks
    assert busy_cores(BEFORE, AFTER, {1}) == pytest.approx(0.5)  # guest time is part of user time
    assert busy_cores(BEFORE, AFTER, {0, 1}) == pytest.approx(0.9)
    assert busy_cores(BEFORE, BEFORE, {0, 1}) == 0


@pytest.mark.parametrize(("busy", "note"), [(0.1, ""), (1.04, "; other programs use 1.0 of ")])
def test_a_busy_machine_is_mentioned(
    busy: float, note: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "stat").write_text(BEFORE)
    monkeypatch.setattr(machine, "STAT", tmp_path / "stat")
    monkeypatch.setattr(machine, "busy_cores", lambda before, after, allowed: busy)
    assert busy_note(0).startswith(note)
    assert bool(busy_note(0)) == bool(note)


def test_a_system_without_the_file_is_not_busy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "STAT", tmp_path / "stat")
    assert busy_note() == ""


NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.mark.parametrize(
    ("given", "busy", "left"),
    [
        ({}, 0.0, {"GOMP_SPINCOUNT": "5000"}),
        ({}, 1.0, {"OMP_WAIT_POLICY": "passive"}),
        ({"OMP_WAIT_POLICY": "active"}, 1.0, {"OMP_WAIT_POLICY": "active"}),
        ({"GOMP_SPINCOUNT": "7"}, 0.0, {"GOMP_SPINCOUNT": "7"}),
    ],
    ids=str,
)
def test_threads_spin_on_an_idle_machine_unless_the_environment_says_more(
    given: dict[str, str], busy: float, left: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "busy_now", lambda interval: busy)
    configure_threads()
    assert {name: os.environ.pop(name) for name in NAMES if name in os.environ} == left


WATCHED = """
import os, sys
from importlib.abc import MetaPathFinder

class Watch(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch after", *{"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys())
            sys.exit()

sys.meta_path.insert(0, Watch())
from harness.__main__ import main
main()
"""


def test_the_command_line_configures_threads_before_torch() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, "env"], capture_output=True, text=True, env=environment
    )
    assert done.stdout in [f"torch after {name}\n" for name in NAMES]
