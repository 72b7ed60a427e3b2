"""Task reports as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import pandas as pd

from harness.errors import printable
from harness.report.task_report import Section, TaskReport, agreement_section


def page(reports: Sequence[TaskReport]) -> str:
    """The whole report, a section for each task."""
    parts = [f"## {prose(report.task)}\n\n{task_section(report, 3)}" for report in reports]
    parts += [section_text(section, 2) for section in agreement_section(reports)]
    return "# Results\n\n" + "\n\n".join(parts) + "\n"


def task_section(report: TaskReport, level: int) -> str:
    """The tables and notes of one task, with headings of a level."""
    parts = [section_text(section, level) for section in report.sections]
    return "\n\n".join([*parts, *notes_text(report, level)])


def notes_text(report: TaskReport, level: int) -> list[str]:
    """The notes of a task with their heading, if there are any."""
    notes = "\n".join(f"- {prose(note)}" for note in report.notes)
    return [f"{'#' * level} Notes\n\n{notes}"] if notes else []


def section_text(section: Section, level: int) -> str:
    """A heading, its sentences if there are any, the table, and the sentence below it."""
    heading, text, below = map(prose, (section.heading, section.text, section.below))
    parts = (f"{'#' * level} {heading}", text, table_text(section.table), below)
    return "\n\n".join(part for part in parts if part)


def table_text(table: pd.DataFrame) -> str:
    """A table, whose cells and headings are escaped; empty without columns."""
    if table.columns.empty:
        return ""
    head = [cell(name).strip() for name in table.columns]
    lines = [[cell(x).strip() for x in line] for line in table.itertuples(index=False, name=None)]
    widths = [
        max(len(name) + 2, *map(len, column)) for name, *column in zip(head, *lines, strict=True)
    ]
    rule = "|".join(f":{'-' * (width + 1)}" for width in widths)

    def line(texts: list[str]) -> str:
        padded = (text.ljust(width) for text, width in zip(texts, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(head), f"|{rule}|", *map(line, lines)])


def prose(text: str) -> str:
    """A text on one line that holds no HTML, no link and no picture of its own."""
    return printable(text).replace("\\", "\\\\").replace("<", "&lt;").replace("](", "]\\(")


def cell(text: Any) -> str:
    """A text as a cell of a table."""
    return prose(str(text)).replace("|", "\\|")


def link(*parts: str) -> str:
    """The address of a file of a page."""
    return quote("/".join(parts))
