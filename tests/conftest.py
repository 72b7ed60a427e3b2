"""A tiny task: 8 x 8 images, a small teacher and features with random weights, few of all.

And the command line as a function.
"""

# ruff: noqa: E402

from __future__ import annotations

from pathlib import Path

from harness.machine import configure_threads

configure_threads()  # before torch is imported

import pytest
import torch
import yaml
from commands import Done, Harness

from harness.cli.main import main
from harness.tasks import Task, load_task
from harness.tasks import task_files as tasks_base
from harness.training.tiny_task import tiny_spec, tiny_text_spec

torch.set_num_threads(1)
CPU = torch.device("cpu")
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def tiny_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `tiny.yaml` that replaces the tasks of the package, and an empty cache."""
    folder = tmp_path / "tasks"
    weights = folder / "weights"
    weights.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_spec(weights)))
    monkeypatch.setattr(tasks_base, "FOLDER", folder)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def tiny(tiny_folder: Path) -> Task:
    """The tiny task."""
    return load_task("tiny")


@pytest.fixture
def tiny_text(tiny_folder: Path) -> Task:
    """The tiny task with prompts."""
    weights = tiny_folder / "text"
    weights.mkdir()
    (tiny_folder / "tiny-text.yaml").write_text(yaml.safe_dump(tiny_text_spec(weights)))
    return load_task("tiny-text")


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
