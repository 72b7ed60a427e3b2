"""A page for each registered method: idea, equations, cost, differences, options and rows."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache

import pandas as pd

from harness.cli.cmd_inspect import kind_of
from harness.methods import METHODS
from harness.registry import first_line
from harness.report.markdown import table_text
from harness.report.rows import Row, load_records
from harness.report.tables import KEYS, QUALITY, results_table
from harness.report.task_report import reports_of
from website.links import ROOT
from website.pictures import picture
from website.texts import HEADINGS, parts, title

TEXTS = ROOT / "docs" / "methods.md"
SOURCE = "docs/methods.md"
COST = ("latency / teacher", "training seconds")
MOST_ROWS = 12


def page(name: str) -> str:
    """A method's page as Markdown, with links as they hold in `docs/methods/`."""
    cls = METHODS[name]
    doc = sys.modules[cls.__module__].__doc__ or ""
    shown = parts(doc)
    blocks = [
        f"# {name}",
        f"{first_line(inspect.getdoc(cls))}.",
        picture(name),
        f"**{title(doc)}.**" if title(doc) else "",
    ]
    for heading in HEADINGS:
        inside = "\n".join(part.html for part in shown if part.heading == heading)
        told = differences(name) if heading == HEADINGS[1] else []
        if inside or told:
            blocks.append(f"## {heading}\n\n<div markdown=0>{inside}</div>\n\n" + "\n".join(told))
    blocks += ["## Cost", facts(name), "## Rows", *rows_text(name), "## Options", options(name)]
    return "\n\n".join(block for block in blocks if block) + "\n"


@cache
def _texts() -> str:
    return TEXTS.read_text(encoding="utf-8")


def differences(name: str) -> list[str]:
    """The points of docs/methods.md that begin with a method's name, or with several."""
    section = _texts().partition("\n## Differences from the papers\n")[2].partition("\n## ")[0]
    points = re.split(r"^(?=- )", section, flags=re.MULTILINE)[1:]
    mine = [point for point in points if name in named(point)]
    general = "What holds for all methods stands in [methods](../methods.md)."
    return [*(point.rstrip() for point in mine), f"\n{general}"]


def named(point: str) -> list[str]:
    """The methods that a point is about: the names in backticks at its beginning."""
    lead = re.match(r"- ((?:`[a-z0-9-]+`(?:, | and )?)+):", point)
    return re.findall(r"`([^`]+)`", lead[1]) if lead else []


def facts(name: str) -> str:
    """A method's line in the table of docs/methods.md, and its source, as a list."""
    lines = [line.strip("| ").split(" | ") for line in _texts().splitlines() if line[:1] == "|"]
    for cells in lines:
        if cells[0].strip() == f"`{name}`":
            told = zip((head.strip() for head in lines[0][1:]), cells[1:], strict=True)
            items = [f"- **{head}**: {cell}" for head, cell in told]
            note = "[What the columns mean](../methods.md#methods)."
            return "\n".join(items) + f"\n\n{note}"
    why = "It is not in the table of methods: [why](../methods.md)."
    return f"{why} Source: {METHODS[name].reference}"


def rows_text(name: str) -> Iterator[str]:
    """A method's published rows, a table for each task."""
    found = False
    for task, rows in published():
        mine = [row for row in rows if row.records[0].method == name and row.finished]
        if not mine:
            continue
        found = True
        more = len(mine) - MOST_ROWS
        yield f"### On {task}"
        yield table_text(columns(results_table(mine[:MOST_ROWS])))
        left = f"{more} more stand" if more > 0 else "All rows of the task stand"
        yield f"{left} in the [results](../results/{task}/README.md)."
    if not found:
        yield "No row of it is published yet."


def columns(table: pd.DataFrame) -> pd.DataFrame:
    """What decides: keys, quality and two columns of cost."""
    wanted = [*KEYS, *(heading for heading, _ in QUALITY.values()), *COST]
    return table[[name for name in wanted if name in table]]


@cache
def published() -> list[tuple[str, Sequence[Row]]]:
    """The rows of each task in `results/`, the lowest headline metric first."""
    reports = reports_of(load_records(ROOT / "results"))
    return [
        (
            report.task,
            sorted(report.finished, key=lambda row: row.interval(report.headline).mean),
        )
        for report in reports
    ]


def options(name: str) -> str:
    """A table of a method's options."""
    lines = [
        {
            "option": f"`--{field.replace('_', '-')}`",
            "default": "none" if info.default in (None, ()) else str(info.default),
            "type": kind_of(info.annotation),
            "meaning": " ".join((info.description or "").split()),
        }
        for field, info in METHODS[name].Config.model_fields.items()
    ]
    return table_text(pd.DataFrame(lines)) if lines else "It has none."
