"""A finished run is told where it stands among the published rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from written import record

from harness.records import Record, publish_records
from harness.report.beside import beside


@pytest.fixture
def published(tmp_path: Path) -> Path:
    rows = [
        record("teacher", steps=0, fid=20.0),
        record("lcm", fid=2.0),
        record("reflow", fid=6.0),
        record("ect", fid=1.0, num_steps=2),
        record("ard", seed=3, fid=4.0),
    ]
    publish_records(tmp_path / "tiny", rows)
    return tmp_path


def test_a_run_is_told_the_best_rows_and_its_place(published: Path) -> None:
    """FID is the mean of two noise sets, half above that of the first."""
    best, place = beside(record(fid=3.0, seed=1), published)
    assert best.startswith("The best published FID in 4 steps: no training teacher, 20.50")
    assert "from the teacher lcm, 2.50" in best
    assert "ect" not in best  # it has 2 steps
    assert place.startswith("This run has 3.50; 1 of 3 trained rows there have a lower one. ")
    assert place.endswith("They trained for up to 5 TFLOPs, this run for 5.")


def test_a_run_is_not_compared_with_itself(published: Path) -> None:
    _, place = beside(record(fid=4.0, seed=3), published)
    assert "1 of 2 trained rows" in place


@pytest.mark.parametrize(
    "other",
    [
        record(task="unknown"),
        record(identity={"n": 17}),
        record(num_steps=3),
    ],
    ids=["no such task", "another N", "no row in so many steps"],
)
def test_nothing_is_said_where_nothing_compares(published: Path, other: Record) -> None:
    assert beside(other, published) == []
