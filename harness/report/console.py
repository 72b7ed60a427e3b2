"""The results table on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from harness.records import Record
from harness.report.rows import rows_of
from harness.report.tables import diversity, notes, results_table


def print_results(records: Sequence[Record], console: Console) -> None:
    """Prints rows and notes; at a narrow terminal one line for each number instead of a squeezed table."""
    rows = rows_of(records)
    frame = results_table(rows)
    frame = frame.drop(columns=[heading for heading, _ in diversity().values() if heading in frame])
    table = Table(show_lines=False, header_style="bold")
    if console.width >= 150:
        for column in frame.columns:
            table.add_column(column, justify="left" if column == "method" else "right")
        for line in frame.itertuples(index=False):
            table.add_row(*map(str, line))
    else:  # one column a row of the report
        table.add_column("")
        for name in frame["method"]:
            table.add_column(str(name), justify="right")
        for column in frame.columns[1:]:
            table.add_row(column, *map(str, frame[column]))
    console.print(table)
    for note in notes(rows):
        console.print(f"- {note}", style="dim", highlight=False)
