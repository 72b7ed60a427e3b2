"""The place of a scenario, for tests that kill its command or let it fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_scenarios import Place
from injection import forked_children

from harness.metrics.latency import Latency
from harness.training.trainer import Trainer


class Drawn:
    """Stands for a figure."""

    @staticmethod
    def savefig(path: Path, format: str) -> None:
        path.write_text(format)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Place]:
    """Makes the place of a scenario. Nothing is timed, and each training step is saved."""
    if torch.cuda.is_available():
        pytest.skip("a process that has met a GPU cannot be forked")
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "work" / "cache"))
    # Claims take a minute, and are no matter of files.
    monkeypatch.setattr("harness.report.publish.claims_section", lambda records: [])
    monkeypatch.setattr("harness.runs.plan.macs_a_pass", None)  # and no estimate is made
    monkeypatch.setattr("harness.runs.preview.preview", None)
    monkeypatch.setattr(
        "harness.runs.evaluation.interleaved_latency", lambda *args, **more: Latency(1.0, 1.0, 1.0)
    )
    for panels in ("_wide_panels", "_small_panels"):  # drawing takes seconds
        monkeypatch.setattr(f"harness.report.pictures.{panels}", lambda plot: Drawn())
    init = Trainer.__init__

    def saving(self: Trainer, *args: Any, **more: Any) -> None:
        init(self, *args, **more)
        self.settings = dataclasses.replace(self.settings, checkpoint_seconds=-1.0)

    monkeypatch.setattr(Trainer, "__init__", saving)

    def make(name: str) -> Place:
        made = Place(tmp_path, name)
        if made.scenario.forks:
            forked_children(monkeypatch, tmp_path / "children")
        made.make()
        return made

    return make
