"""What plots show, from records that are written by hand."""

from __future__ import annotations

import math

import pytest
from written import METHODS, field, record, trained

from harness.records import Exposure, Record
from harness.report.plots import Line, Panel, ablations, exposure_lines, passes_lines
from harness.report.rows import rows_of
from harness.report.task_report import TaskReport


def by_passes(records: list[Record]) -> list[Line]:
    report = TaskReport.of(records)
    return passes_lines(report.finished, report.equal, "fid")


def ablations_of(records: list[Record]) -> list[Panel]:
    report = TaskReport.of(records)
    return ablations(report.finished, report.equal, "fid")


def test_quality_by_passes_is_of_equal_budgets_and_of_the_teacher() -> None:
    in_one = [trained(method, 9.0, num_steps=1, seed=seed) for method in METHODS for seed in (0, 1)]
    teachers = [
        record("teacher", steps=0, num_steps=steps, fid=20.0 - steps) for steps in (8, 4, 2)
    ]
    less = [trained("ctm", 1.0, flops=3e12, num_steps=steps) for steps in (1, 4)]
    alone, untrained = (
        trained("dmd2", 1.0),
        record("imm", steps=0, num_steps=2).model_copy(update={"options": {}}),
    )
    lines = {
        line.label: line
        for line in by_passes([*field(), *in_one, *teachers, *less, alone, untrained])
    }
    assert lines.keys() == {*METHODS, "teacher"}
    assert lines["imm"].x == [1, 4]
    assert lines["imm"].y == [9.5, 3.5]
    # Seeds agree and two noise sets differ by 1.
    assert lines["imm"].half_width[0] == pytest.approx(12.706 / 2, rel=1e-3)
    assert math.isnan(lines["imm"].half_width[1])
    assert lines["teacher"].x == [2, 4, 8]
    assert by_passes([*field()[:3], *teachers]) == []


def test_what_is_shown_by_passes_is_no_ablation_of_the_number_of_steps() -> None:
    equal, less = (
        [trained("ctm", 1.0, flops=flops, num_steps=steps) for steps in (1, 2, 4)]
        for flops in (6.02e12, 3e12)
    )
    assert ablations_of([*field(), *equal]) == []
    (panel,) = ablations_of([*field(), *less])
    assert (panel.title, panel.x_label, panel.lines[0].x) == (
        "ctm, trained 100 × 64",
        "num_steps",
        [1, 2, 4],
    )


def test_exposure_is_shown_from_few_steps_to_many() -> None:
    exposure = Exposure(
        on_teachers_history=[0.0, 0.1], on_own_history=[0.0, 0.3], drift=[0.0, 0.2], n=8
    )
    found = exposure_lines(
        rows_of(
            [
                record(num_steps=steps, steps=1000 - 100 * steps, exposure=exposure)
                for steps in (8, 2, 4)
            ]
        )
    )
    assert sorted(found) == [2, 4, 8]
    assert found[2][0].y[1] == 0.3 - 0.1
