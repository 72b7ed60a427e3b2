"""Numbers in a text of findings come from records."""

from __future__ import annotations

from pathlib import Path

import pytest
from written import record

from harness.errors import UsageError
from harness.report.findings import findings
from harness.report.task_report import reports_of

REPORTS = reports_of(
    [
        record(fid=2.0),
        record(fid=4.0, run_id="other", seed=1),
        record("lcm", fid=1.0, run_id="failed").model_copy(update={"status": "failed"}),
    ]
)
((LINE,),) = [report.finished for report in REPORTS]
ROW = f"tiny, {LINE.num_steps} steps: {LINE.label}"


def text_of(folder: Path, text: str) -> str:
    (folder / "findings.md").write_text(f"{text}\n")
    return findings(folder, REPORTS)[0]


def test_a_number_is_that_of_its_row_or_of_a_seed(tmp_path: Path) -> None:
    shown = LINE.text("fid", 2)
    assert shown.startswith("3.50 ± ")
    text = text_of(tmp_path, f"ARD has [[{ROW}]], or [[{ROW}; seed 1]]; [this](link) stays.")
    assert text == f"ARD has {shown}, or 4.50; [this](link) stays."


def test_without_a_text_there_are_no_findings(tmp_path: Path) -> None:
    assert findings(tmp_path, REPORTS) == []


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (ROW.replace("ard,", "lcm,"), "0 rows"),
        (ROW.replace("tiny", "digits"), "0 rows"),
        (ROW.replace("4 steps", "5 steps"), "0 rows"),
        (f"{ROW}; seed 7", "no finished run of this seed"),
    ],
)
def test_a_number_that_no_record_gives_is_refused(place: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        text_of(tmp_path, f"It has [[{place}]].")
