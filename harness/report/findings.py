"""Findings: what somebody wrote of results, with numbers that the records give.

A number in a `findings.md` is written as `[[digits, 2 steps: ctm]]`: the task, the number of steps
and the row's name in the tables. It becomes the row's headline metric with its interval, or with
`; seed 0` at its end the number of one seed. So no text keeps a number that its table has lost.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from harness.errors import UsageError
from harness.files import inside
from harness.report.rows import Row
from harness.report.statistics import number
from harness.report.tables import QUALITY
from harness.report.task_report import TaskReport

PLACE = re.compile(
    r"\[\[(?P<task>[^][,:]+), (?P<steps>\d+) steps?: "
    r"(?P<label>[^][;]+)(?:; seed (?P<seed>\d+))?\]\]"
)
"""A number of a row."""


def findings(folder: Path, reports: Sequence[TaskReport]) -> list[str]:
    """The text of a folder's `findings.md` with its numbers, if somebody has written one.

    Raises UsageError for a number of a row or seed that is not there, or of several rows.
    """
    path = inside(folder / "findings.md", folder)
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8").strip()
    return [PLACE.sub(lambda match: _number(match, reports, path), text)]


def _number(match: re.Match[str], reports: Sequence[TaskReport], path: Path) -> str:
    """The number that one place stands for."""
    task, steps, label, seed = match.groups()
    found = [
        (report, row)
        for report in reports
        for row in report.finished
        if (report.task, row.num_steps, row.label) == (task, int(steps), label)
    ]
    if len(found) != 1:
        raise UsageError(
            f"{path} asks for {match[0]}, but {len(found)} rows have that task, number of steps "
            "and name: take them from the page of details"
        )
    ((report, row),) = found
    digits = QUALITY[report.headline][1]
    if seed is None:
        return row.text(report.headline, digits)
    return number(_value(row, report.headline, int(seed), match[0], path), f".{digits}f")


def _value(row: Row, name: str, seed: int, place: str, path: Path) -> float:
    """The metric of one seed of a row."""
    for record in row.finished:
        if record.config["seed"] == seed:
            return record.metrics[name].mean
    raise UsageError(f"{path} asks for {place}, but that row has no finished run of this seed")
