"""All records as one HTML page that needs nothing else: tables to sort and filter, plots, grids, claims, failures, environments."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import pandas as pd

from harness.records import Record
from harness.report.claims import claims_table, read_claims
from harness.report.compare import against_best_table, agreement_table, equal_compute_table, equal_images_table
from harness.report.figures import curves_figure, pareto_figure
from harness.report.markdown import AGAINST_BEST, CLAIMS, by_task
from harness.report.plots import BY_PASSES, ablations, budget_lines, exposure_lines, passes_lines
from harness.report.rows import Row, counted, headline, rows_of
from harness.report.statistics import metric_interval
from harness.report.tables import QUALITY, differences_table, error_split_table, notes, results_table

MOST_GRIDS = 48
"""Grids of a task that are shown."""


def html_page(records: Sequence[Record], results: Path, claims: Path = CLAIMS) -> str:
    """The page.

    Args:
        results: the results folder, where the samples of the records lie.
        claims: the file of published claims; without it that section is left out.
    """
    tasks = {task: rows_of(found) for task, found in by_task(records).items()}
    sections = [(f"task-{task}", task, _task_section(rows, results)) for task, rows in tasks.items()]
    agreement = agreement_table(tasks)
    if len(agreement):
        said = "Spearman's rank correlation between tasks, over methods at equal training FLOPs that both have."
        sections.append(("agreement", "Agreement between tasks", f"<p>{said}</p>{_table(agreement)}"))
    if claims.is_file():
        said = "What papers say, and what was measured here. On another task only the direction of a claim can be checked."
        sections.append(("claims", "Claims", f"<p>{said}</p>{_table(claims_table(read_claims(claims), records), prose=True)}"))
    failed = [record for record in records if record.status == "failed"]
    if failed:
        table = pd.DataFrame({"run": [record.run_id for record in failed], "reason": [record.reason for record in failed]})
        sections.append(("failures", "Failures", _table(table, prose=True)))
    body = "".join(f'<section id="{name}"><h2>{html.escape(title)}</h2>{inner}</section>' for name, title, inner in sections)
    nav = "".join(f'<a href="#{name}">{html.escape(title)}</a>' for name, title, _ in sections)
    lead = f"{len(records)} runs. Click a heading to sort; ± is the 95 % interval of the notes below each table."
    page = files("harness.report").joinpath("page.html").read_text(encoding="utf-8")
    for name, text in {"TITLE": "Few-step distillation: results", "LEAD": lead, "NAV": nav, "BODY": body}.items():
        page = page.replace(f"@@{name}@@", text)
    return page


def _task_section(rows: Sequence[Row], results: Path) -> str:
    finished = [row for row in rows if row.finished]
    task, parts = rows[0].records[0].task, []
    equal = equal_compute_table(rows)
    if len(equal):
        parts.append(f"<h3>Methods at equal training FLOPs</h3>{_table(equal)}")
        against = against_best_table(rows)
        parts.append(f"<p>{html.escape(AGAINST_BEST)}</p>{_table(against)}" if len(against) else "")
        parts.append(f"<h3>The same after equally many images</h3>{_table(equal_images_table(rows))}")
    parts.append(f"<h3>All rows</h3>{_table(results_table(rows), f'filter-{task}')}")
    if finished:
        figures = _figures(finished)
        parts.append(f'<h3>Plots</h3><div class="figures">{"".join(figures)}</div>' if figures else "")
        for title, table in (("What the error is made of", error_split_table(rows)), ("Differences", differences_table(rows))):
            parts.append(f"<h3>{title}</h3>{_table(table)}" if len(table) else "")
        grids = _grids(finished, results)
        said = "<p>Samples of noise set 0; the lower row is the task's reference from the same noise.</p>"
        parts.append(f'<h3>Samples</h3>{said}<div class="figures">{"".join(grids)}</div>' if grids else "")
        parts.append(f'<h3>Notes</h3><ul class="notes">{"".join(f"<li>{html.escape(note)}</li>" for note in notes(rows))}</ul>')
    return "".join(parts)


def _table(table: pd.DataFrame, filter_id: str = "", prose: bool = False) -> str:
    """A table of text cells, sortable, with a box to filter it if it has an id."""
    if not len(table):
        return "<p>Nothing yet.</p>"
    heads = "".join(f'<th scope="col">{html.escape(str(column))}</th>' for column in table.columns)
    lines = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in line) for line in table.itertuples(index=False))
    rows = "".join(f"<tr>{line}</tr>" for line in lines)
    box = ""
    if filter_id:
        box = f'<input type="search" id="{filter_id}" placeholder="Filter: words that a row must hold" aria-label="Filter rows">'
        box += '<span class="count"></span>'
    kind = "live prose" if prose else "live"
    return (f'{box}<div class="scroll"><table class="{kind}" data-filter="{filter_id}"><thead><tr>{heads}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>")  # fmt: skip


def _figures(rows: Sequence[Row]) -> list[str]:
    """Pareto plots, quality by passes, ablations, exposure bias and training curves, as SVG."""
    name = headline(rows)
    heading = QUALITY[name][0].rstrip(" ↓↑")
    found = []
    costs = {
        "MMACs a sample": lambda cost: cost.macs_per_sample / 1e6,
        "latency / reference": lambda cost: cost.latency.ratio if cost.latency else None,
        "training TFLOPs with trajectories": lambda cost: cost.training.whole_flops / 1e12 if cost.training else None,
    }
    for label, of in costs.items():
        points = []
        for row in rows:
            cost = row.finished[0].cost
            x = of(cost) if cost else None
            if x:
                points.append((f"{row.label}, {counted(row.num_steps)}", x, metric_interval(row.finished, name).mean))
        if len(points) > 1:
            found.append(_figure("pareto", pareto_figure(points, label, heading), f"{heading} against {label}; the front is named."))
    if lines := passes_lines(rows):
        found.append(
            _figure("passes", curves_figure(lines, "network passes a sample", heading, log=True, bars=True), f"{heading} {BY_PASSES}")
        )
    for title, curve in ablations(rows, name):
        caption = f"{heading} by {curve.label}: {title}. Bars are 95 % intervals."
        found.append(_figure("ablation", curves_figure([curve], curve.label, heading, bars=True), caption))
    for steps, lines in exposure_lines(rows).items():
        caption = f"Exposure bias in {steps}: error on the student's own history minus that on the teacher's."
        found.append(_figure("exposure", curves_figure(lines, "step", "gap"), caption))
    for steps, lines in budget_lines(rows).items():
        caption = f"{heading} along training in {steps}, on noise set 0."
        found.append(_figure("training", curves_figure(lines, "images", heading, log=True), caption))
    return found


def _figure(kind: str, svg: str, caption: str) -> str:
    return f'<figure class="{kind}">{svg}<figcaption>{html.escape(caption)}</figcaption></figure>'


def _grids(rows: Sequence[Row], results: Path) -> list[str]:
    found = []
    for row in rows[:MOST_GRIDS]:
        record = row.finished[0]
        places = (results / "runs" / record.run_id / "samples.png", results / record.task / "samples" / f"{record.run_id}.png")
        picture = next((place for place in places if place.is_file()), None)
        if picture:
            data = base64.b64encode(picture.read_bytes()).decode()
            trained = f", trained {row.training[0]} × {row.training[1]}" if row.training[0] else ""
            caption = html.escape(f"{row.label}, {counted(row.num_steps)}{trained}")
            found.append(
                f'<figure class="grid"><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
            )
    return found
