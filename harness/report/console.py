"""A task's results on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from harness.records import Record
from harness.report.labels import label
from harness.report.tables import diversity
from harness.report.task_report import TaskReport


def print_results(records: Sequence[Record], console: Console) -> None:
    """Prints the rows and notes of one task; a narrow terminal shows a line for each number."""
    report = TaskReport.of(records)
    frame = report.results
    frame = frame.drop(columns=[heading for heading, _ in diversity().values() if heading in frame])
    table = Table(show_lines=False, header_style="bold")
    if console.width >= 150:
        for column in frame.columns:
            table.add_column(column, justify="left" if column == "method" else "right")
        for line in frame.itertuples(index=False):
            table.add_row(*map(str, line))
    else:  # a column for each row of the report
        table.add_column("")
        for name in frame["method"]:
            table.add_column(str(name), justify="right")
        for column in frame.columns[1:]:
            table.add_row(column, *map(str, frame[column]))
    console.print(table)
    outside = [f"{label(each.record)} is in no table: {each.reason}." for each in report.apart]
    for note in (*outside, *report.notes):
        console.print(f"- {note}", style="dim", highlight=False)
