"""Numbers that are not finite: no format shows a bare nan, and no plot fails by one."""

from __future__ import annotations

import math
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from written import field, metric, record

from harness.cli.cmd_report import rendered
from harness.records import Exposure, Record, write_record
from harness.report.console import print_results
from harness.report.pictures import write_plots
from harness.report.rows import load_records
from harness.report.task_report import TaskReport

BAD = [math.nan, math.inf, -math.inf]
BARE = re.compile(r"\b(nan|inf|infinity)\b", re.IGNORECASE)


PARTS = ("fid", "kid", "exposure", "milestones", "latency", "floor", "apart", "distance_to_teacher")


def spoil(one: Record, bad: float, part: str) -> None:
    """Puts a bad number into one part of a record."""
    if part == "exposure":
        one.exposure = Exposure(
            on_teachers_history=[0.1, bad], on_own_history=[bad, bad], drift=[0.0, bad], n=4
        )
    elif part == "milestones":
        one.milestones[1].quality["fid"] = bad
    elif part == "latency":
        assert one.cost is not None
        assert one.cost.latency is not None
        one.cost.latency.ratio = bad
    elif part == "floor":
        one.metrics["fid_floor"].values[0] = bad
    elif part == "apart":
        one.metrics["fid"] = metric("fid", {0: bad}, seed=9)
    else:
        one.metrics[part].values[1] = bad


def spoiled(bad: float, *parts: str) -> list[Record]:
    """Two seeds of six methods, and the teacher; each part is spoiled in another record."""
    records = [*field(), *field(seed=1), record("teacher", steps=0)]
    records = [one.model_copy(deep=True) for one in records]
    for one, part in zip(records, parts, strict=False):
        spoil(one, bad, part)
    return records


def seen(records: list[Record], folder: Path) -> dict[str, str]:
    """What each format shows of records that were written and read again."""
    for one in records:
        write_record(folder / "runs" / one.run_id / "record.json", one)
    found = load_records(folder)
    assert len(found) == len(records)
    report, terminal = TaskReport.of(found), StringIO()
    print_results(found, Console(file=terminal, width=400))
    write_plots(report.plots, folder)
    forms = {form: rendered(form, found, folder) for form in ("markdown", "latex", "csv", "html")}
    raw = r'<script.*?</script>|<style.*?</style>|<pre class="record".*?</pre>'
    body = re.sub(raw, "", forms["html"], flags=re.DOTALL)
    return {**forms, "html": body, "terminal": terminal.getvalue()}


@pytest.fixture(autouse=True)
def no_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    """The section of claims, which counts a large network each time."""
    monkeypatch.setattr("harness.report.html.claims_section", lambda *given: [])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "parts",
    [PARTS, *(pytest.param((part,), marks=pytest.mark.slow) for part in PARTS)],
    ids=lambda parts: parts[0] if len(parts) == 1 else "all",
)
def test_no_format_shows_a_bare_nan(parts: tuple[str, ...], bad: float, tmp_path: Path) -> None:
    texts = seen(spoiled(bad, *parts), tmp_path)
    assert [(form, found) for form in texts for found in BARE.findall(texts[form])] == []
    assert parts == ("milestones",) or "not finite" in texts["markdown"]
