"""A task's results as a LaTeX table."""

from __future__ import annotations

import pandas as pd

from harness.errors import printable
from harness.report.tables import KEYS, QUALITY
from harness.report.task_report import TaskReport

SHOWN = {*KEYS, *(heading for heading, _ in QUALITY.values()), "NFE", "MMACs / sample", "status"}
"""The columns of a table for a paper."""
SPECIAL = {letter: f"\\{letter}" for letter in "&%$#_{}"}
SPECIAL |= {
    "\\": r"\textbackslash{}",
    "[": "{[}",  # at the start of a row it would be an argument of the line end before it
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
SPECIAL |= {"±": r"$\pm$", "×": r"$\times$", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "−": "$-$"}


def latex_report(report: TaskReport) -> str:
    """A task's rows with the columns for a paper."""
    return latex_table(
        report.results[[column for column in report.results if column in SHOWN]],
        f"Results on {report.task}.",
    )


def escaped(text: str) -> str:
    """A text on one line without commands of LaTeX."""
    return "".join(SPECIAL.get(letter, letter) for letter in printable(text))


def latex_table(table: pd.DataFrame, caption: str) -> str:
    """A `table` environment with the rules of booktabs."""

    def line(cells: list[str]) -> str:
        return " & ".join(map(escaped, cells)) + r" \\"

    rows = [line([str(cell) for cell in row]) for row in table.itertuples(index=False)]
    head = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escaped(caption)}}}",
        rf"\begin{{tabular}}{{{'l' * len(table.columns)}}}",
        r"\toprule",
    ]
    tail = [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(
        [*head, line([str(column) for column in table.columns]), r"\midrule", *rows, *tail]
    )
