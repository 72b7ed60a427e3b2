"""One self-contained HTML page: tables to sort and filter, plots and sample grids."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

import pandas as pd

from harness.errors import printable
from harness.files import inside
from harness.records import Cost, Record
from harness.report.figures import curves_figure, pareto_figure
from harness.report.labels import counted
from harness.report.publish import grid_caption
from harness.report.tables import plain_heading
from harness.report.task_report import (
    CLAIMS,
    GRIDS,
    Section,
    TaskReport,
    agreement_section,
    claims_section,
    reports_of,
)

FILTERED = 10
"""Lines from which on a table has a box to filter them."""
SHORT = 8
"""Letters of a first column that needs no width of its own."""
EQUAL = 1.1
"""Costs whose ratio stays below this are equal: nothing is to be seen against them."""
COSTS: dict[str, Callable[[Cost], float | None]] = {
    "MMACs a sample": lambda cost: cost.macs_per_sample / 1e6,
    "latency / reference": lambda cost: cost.latency.ratio if cost.latency else None,
    "training TFLOPs with trajectories": lambda cost: (
        cost.training.whole_flops / 1e12 if cost.training else None
    ),
}
"""What quality is shown against, by the label of its axis."""


def html_page(records: Sequence[Record], results: Path, claims: Path = CLAIMS) -> str:
    """The page.

    Args:
        results: the results folder, where the sample grids lie.
        claims: the file of published claims; without it that section is left out.
    """
    reports = reports_of(records)
    sections = [(f"task-{report.task}", report.task, _task(report, results)) for report in reports]
    others = (*agreement_section(reports), *claims_section(records, claims), *_failures(records))
    for section in others:
        name, inner = section.heading.split()[0].lower(), _table(section.table, prose=True)
        sections.append((name, section.heading, _text(section.text) + inner))
    lead = (
        f"{len(records)} runs. Click a heading to sort; "
        "± is the 95 % interval that each task's notes explain."
    )
    page = files("harness.report").joinpath("page.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": "Few-step distillation: results",
        "LEAD": lead,
        "NAV": "".join(
            f'<a href="#{escaped(name)}">{escaped(title)}</a>' for name, title, _ in sections
        ),
        "BODY": "".join(
            f'<section id="{escaped(name)}"><h2>{escaped(title)}</h2>{inner}</section>'
            for name, title, inner in sections
        ),
    }
    for name, text in parts.items():
        page = page.replace(f"@@{name}@@", text)
    return page


def escaped(text: str) -> str:
    """A text on one line without tags, also inside quotes."""
    return html.escape(printable(text))


def _failures(records: Sequence[Record]) -> list[Section]:
    failed = [record for record in records if record.status == "failed"]
    table = pd.DataFrame(
        {
            "run": [record.run_id for record in failed],
            "reason": [record.reason for record in failed],
        }
    )
    return [Section("Failures", "", table)] if failed else []


def _task(report: TaskReport, results: Path) -> str:
    """The best rows, plots, grids and notes of one task, then the details, folded."""
    shown, folded = [], []
    for number, section in enumerate(report.sections):
        filter_id = f"filter-{report.task}-{number}" if len(section.table) >= FILTERED else ""
        inner = f"{_text(section.text)}{_table(section.table, filter_id)}{_text(section.below)}"
        if section.detail:
            folded.append(_folded(section.heading, inner))
        else:
            shown.append(f"<h3>{escaped(section.heading)}</h3>{inner}")
    if figures := _figures(report, detail=False):
        shown.insert(1, f'<div class="figures">{"".join(figures)}</div>')
    if grids := _grids(report, results):
        shown.append(f'<h3>Samples</h3><p>{GRIDS}</p><div class="figures">{"".join(grids)}</div>')
    if report.notes:
        items = "".join(f"<li>{escaped(note)}</li>" for note in report.notes)
        shown.append(f'<h3>Notes</h3><ul class="notes">{items}</ul>')
    if figures := _figures(report, detail=True):
        folded.append(_folded("Curves", f'<div class="figures">{"".join(figures)}</div>'))
    return "".join([*shown, *folded])


def _folded(heading: str, inner: str) -> str:
    return f"<details><summary>{escaped(heading)}</summary>{inner}</details>"


def _text(sentences: str) -> str:
    return f"<p>{escaped(sentences)}</p>" if sentences else ""


def _table(table: pd.DataFrame, filter_id: str = "", prose: bool = False) -> str:
    """A table of text cells that can be sorted, and filtered if it has an id."""
    heads = "".join(f'<th scope="col">{escaped(str(column))}</th>' for column in table.columns)
    lines = (
        "".join(f"<td>{escaped(str(cell))}</td>" for cell in line)
        for line in table.itertuples(index=False)
    )
    rows = "".join(f"<tr>{line}</tr>" for line in lines)
    box = ""
    if filter_id:
        box = (
            f'<input type="search" id="{escaped(filter_id)}" '
            'placeholder="Filter: words that a row must hold" aria-label="Filter rows">'
            '<span class="count"></span>'
        )
    short = table.iloc[:, 0].map(len).max() <= SHORT
    kind = "live" + " prose" * prose + " short" * bool(short)
    return (
        f'{box}<div class="scroll"><table class="{kind}" data-filter="{escaped(filter_id)}">'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _figures(report: TaskReport, detail: bool) -> list[str]:
    """Quality against cost, then the panels of each plot, as SVG; or those of details."""
    found = [] if detail else [_pareto(report, label) for label in COSTS]
    for plot in report.plots:
        for panel in plot.panels if plot.detail is detail else ():
            svg = curves_figure(
                panel.lines, panel.x_label, plot.y_label, log=plot.log, bars=plot.bars
            )
            found.append(
                _figure(
                    plot.name,
                    svg,
                    f"{panel.title}: {plot.caption}" if panel.title else plot.caption,
                )
            )
    return [figure for figure in found if figure]


def _pareto(report: TaskReport, label: str) -> str:
    """The headline metric of each row against a cost; empty where all cost the same."""
    points = []
    for row in report.finished:
        cost = row.finished[0].cost
        if cost and not row.diverged and (x := COSTS[label](cost)):
            points.append(
                (
                    f"{row.label}, {counted(row.num_steps)}",
                    x,
                    row.interval(report.headline).mean,
                )
            )
    costs = [x for _, x, _ in points]
    if len(points) < 2 or max(costs) < EQUAL * min(costs):
        return ""
    heading = plain_heading(report.headline)
    return _figure(
        "pareto",
        pareto_figure(points, label, heading),
        f"{heading} against {label}; the points of the front are named.",
    )


def _figure(kind: str, svg: str, caption: str) -> str:
    return f'<figure class="{kind}">{svg}<figcaption>{escaped(caption)}</figcaption></figure>'


def _grids(report: TaskReport, results: Path) -> list[str]:
    found = []
    for row in report.grids:
        run_id = row.finished[0].run_id
        places = (
            results / "runs" / run_id / "samples.png",
            results / report.task / "samples" / f"{run_id}.png",
        )
        if picture := next((place for place in places if place.is_file()), None):
            inside(picture, results)
            data, caption = (
                base64.b64encode(picture.read_bytes()).decode(),
                escaped(grid_caption(row)),
            )
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
            found.append(f'<figure class="grid">{image}<figcaption>{caption}</figcaption></figure>')
    return found
