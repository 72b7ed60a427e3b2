"""A results folder that the command line made."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import ARD, Harness

from harness.tasks import Task


@pytest.fixture
def results(tiny: Task, harness: Harness, tmp_path: Path) -> Path:
    """A results folder with a run and its reference."""
    folder = tmp_path / "results"
    done = harness(*ARD, "--history-layers", 2, "--results", folder)
    assert done.code == 0, done.err
    return folder
