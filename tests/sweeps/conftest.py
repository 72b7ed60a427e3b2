"""Runs of searches that leave a record at once."""

from __future__ import annotations

from typing import Any

import pytest
import searched
from searched import CPU
from written import record

from harness.provenance import capture_environment
from harness.records import write_record
from harness.runs.run import Run


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Runs are not made, but leave a record at once. Its FID is `searched.distance` + 0.5."""
    runs: list[Any] = []

    def execute(self: Run, reuse: bool = False, wait: bool = False) -> None:
        runs.append(self.resolved)
        written = record("step-distillation", fid=searched.distance(self))
        cost = written.cost.model_copy(update={"macs_per_sample": self.resolved.num_steps})  # type: ignore[union-attr]
        found = {
            "run_id": self.resolved.run_id,
            "cost": cost,
            "environment": capture_environment(CPU),
        }
        write_record(self.folder / "record.json", written.model_copy(update=found))

    monkeypatch.setattr(Run, "execute", execute)
    return runs
