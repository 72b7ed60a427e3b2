"""Pieces of HTML: what they quote is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence

import pandas as pd

from harness.errors import printable
from harness.report.tables import KEYS

SHORT = 8
"""Letters of a first column that needs no width of its own."""
NAMING = ("method", "best", "next", "first", "second")
"""Columns whose cells name a row."""
DECIDING = (*KEYS, "status", "latency / teacher", "training TFLOPs + trajectories")
"""Columns of all rows that a reader sees first, beside the headline metric."""


def escaped(text: str) -> str:
    """A text on one line without tags, also inside quotes."""
    return html.escape(printable(text))


def folded(heading: str, inner: str, kind: str = "") -> str:
    opening = f'<details class="{kind}">' if kind else "<details>"
    return f"{opening}<summary>{escaped(heading)}</summary>{inner}</details>"


def prose(sentences: str) -> str:
    return f"<p>{escaped(sentences)}</p>" if sentences else ""


def figure(kind: str, plot: str, caption: str) -> str:
    return f'<figure class="{kind}">{plot}<figcaption>{escaped(caption)}</figcaption></figure>'


def table_of(
    table: pd.DataFrame,
    links: Mapping[tuple[str, str], str] | None = None,
    kind: str = "",
    anchors: Sequence[str] = (),
    headline: str = "",
) -> str:
    """A table of text cells that can be sorted.

    Args:
        links: the rows of the page by label and number of steps.
        kind: a further class.
        anchors: the row of each line, if the table is that of all rows.
        headline: heading of the metric that rows are compared by.
    """
    heads = "".join(
        f'<th scope="col"{" data-deciding" * (column in (*DECIDING, headline))}'
        f"{' data-headline' * (column == headline)}>"
        f"{escaped(str(column))}</th>"
        for column in table.columns
    )
    rows = []
    for number, line in enumerate(table.to_dict("records")):
        anchor = anchors[number] if anchors else ""
        steps = f' data-steps="{escaped(str(line["steps"]))}"' if "steps" in line else ""
        cells = [
            _cell(str(cell), anchor if place == 0 else _target(str(column), line, links or {}))
            for place, (column, cell) in enumerate(line.items())
        ]
        row = f' data-row="{anchor}"' if anchor else ""
        rows.append(f"<tr{row}{steps}>{''.join(cells)}</tr>")
    short = table.iloc[:, 0].map(len).max() <= SHORT
    name = " ".join(filter(None, ("live", kind, "short" if short else "")))
    return (
        f'<div class="scroll" tabindex="0"><table class="{name}">'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(text: str, anchor: str) -> str:
    inner = f'<a href="#{anchor}">{escaped(text)}</a>' if anchor and text else escaped(text)
    return f"<td>{inner}</td>"


def _target(
    column: str, line: Mapping[object, object], links: Mapping[tuple[str, str], str]
) -> str:
    """The row that a cell names, or whose number it is; "" if it is none or not one alone."""
    if column in NAMING:
        return links.get((str(line[column]), str(line.get("steps"))), "")
    of_steps = re.search(r", (\d+) steps?$", column)
    return links.get((str(line.get("method")), of_steps[1]), "") if of_steps else ""
