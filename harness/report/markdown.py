"""Task reports as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from harness.report.task_report import Section, TaskReport, agreement_section


def page(reports: Sequence[TaskReport]) -> str:
    """The whole report, a section for each task."""
    parts = [f"## {report.task}\n\n{task_section(report, 3)}" for report in reports]
    parts += [section_text(section, 2) for section in agreement_section(reports)]
    return "# Results\n\n" + "\n\n".join(parts) + "\n"


def task_section(report: TaskReport, level: int) -> str:
    """The tables and notes of one task, with headings of a level."""
    parts = [section_text(section, level) for section in report.sections]
    if report.notes:
        parts.append(f"{'#' * level} Notes\n\n" + "\n".join(f"- {note}" for note in report.notes))
    return "\n\n".join(parts)


def section_text(section: Section, level: int) -> str:
    """A heading, its sentences if there are any, the table, and the sentence below it."""
    table = section.table.to_markdown(index=False, disable_numparse=True)
    return "\n\n".join(
        part
        for part in (f"{'#' * level} {section.heading}", section.text, table, section.below)
        if part
    )
