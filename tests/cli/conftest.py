"""The command line as a function, and a results folder that it made."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import ARD, Done, Harness

from harness.cli.main import main
from harness.tasks import Task


@pytest.fixture
def harness(capsys: pytest.CaptureFixture[str]) -> Harness:
    """Runs `harness ...` in this process; any exception but SystemExit fails the test."""

    def call(*args: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Done(ended.value.code, captured.out, captured.err)

    return call


@pytest.fixture
def results(tiny: Task, harness: Harness, tmp_path: Path) -> Path:
    """A results folder with a run and its reference."""
    folder = tmp_path / "results"
    done = harness(*ARD, "--history-layers", 2, "--results", folder)
    assert done.code == 0, done.err
    return folder
