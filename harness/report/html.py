"""One self-contained HTML page: tables, plots and samples, and a small application over them.

Everything stands in the page as plain HTML. The scripts of `page/` only choose, sort, open and
compare what is there, so a reader without JavaScript misses nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import pandas as pd

from harness.records import Cost, Record
from harness.report.figures import Named, Point, curves_figure, pareto_figure
from harness.report.labels import counted
from harness.report.markup import escaped, figure, folded, prose, table_of
from harness.report.opened import Room, measured, opened
from harness.report.publish import grid_caption
from harness.report.rows import Row
from harness.report.strips import SAMPLES, grid_file, lacking, strips_of
from harness.report.tables import QUALITY, plain_heading
from harness.report.task_report import (
    CLAIMS,
    GRIDS,
    Section,
    TaskReport,
    agreement_section,
    claims_section,
    reports_of,
)

EQUAL = 1.1
"""Costs whose ratio stays below this are equal: nothing is to be seen against them."""
MOST_LETTERS = 5_000_000
"""Letters of pictures and records, so that a page stays under 8 MB."""
SCRIPTS = ("difference.js", "plots.js", "rows.js", "choices.js")
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
    reports, room, count = reports_of(records), Room(MOST_LETTERS), 0
    sections = []
    for report in reports:
        task = _Task(report, results, room, count)
        count += len(report.rows)
        sections.append((f"task-{report.task}", report.task, task.attributes(), task.body()))
    others = (*agreement_section(reports), *claims_section(records, claims), *_failures(records))
    for section in others:
        name, inner = section.heading.split()[0].lower(), table_of(section.table, kind="prose")
        sections.append((name, section.heading, "", prose(section.text) + inner))
    folder = files("harness.report").joinpath("page")
    parts = {
        "LEAD": f"{len(records)} runs in {counted(count, 'row')}. "
        "± is the 95 % interval that each task's notes explain.",
        "NAV": "".join(
            f'<a href="#{escaped(name)}">{escaped(title)}</a>' for name, title, *_ in sections
        ),
        "BODY": "".join(
            f'<section id="{escaped(name)}"{attributes}><h2>{escaped(title)}</h2>{inner}</section>'
            for name, title, attributes, inner in sections
        ),
        "STYLE": folder.joinpath("page.css").read_text(encoding="utf-8"),
        "SCRIPT": "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    page = folder.joinpath("page.html").read_text(encoding="utf-8")
    return re.sub("@@([A-Z]+)@@", lambda found: parts[found[1]], page)


def _failures(records: Sequence[Record]) -> list[Section]:
    failed = [record for record in records if record.status == "failed"]
    table = pd.DataFrame(
        {
            "run": [record.run_id for record in failed],
            "reason": [record.reason for record in failed],
        }
    )
    return [Section("Failures", "", table)] if failed else []


@dataclass(frozen=True)
class _Task:
    """The part of the page that shows one task.

    Attributes:
        first: how many rows stand before its own in the page.
    """

    report: TaskReport
    results: Path
    room: Room
    first: int

    @cached_property
    def rows(self) -> dict[str, Named]:
        """The rows by the run id of their first seed."""
        return {
            row.records[0].run_id: Named(f"row-{number}", grid_caption(row))
            for number, row in enumerate(self.report.rows, self.first)
        }

    @cached_property
    def links(self) -> dict[tuple[str, str], str]:
        """The rows by label and number of steps, where both name one row alone."""
        names = [(row.label, str(row.num_steps)) for row in self.report.rows]
        times = Counter(names)
        return {
            name: row.anchor
            for name, row in zip(names, self.rows.values(), strict=True)
            if times[name] == 1
        }

    def attributes(self) -> str:
        """What the scripts read of a task."""
        name, metrics = escaped(self.report.task), escaped(json.dumps(measured()))
        return f' class="task" data-task="{name}" data-metrics="{metrics}"'

    def body(self) -> str:
        """What is best, plots, all rows, samples and notes, then the details, folded."""
        report, shown, below = self.report, list[str](), list[str]()
        for section in report.sections:
            if section.of_results:
                continue
            inner = table_of(section.table, self.links)
            inner = f"{prose(section.text)}{inner}{prose(section.below)}"
            if section.detail:
                below.append(folded(section.heading, inner))
            else:
                shown.append(f"<h3>{escaped(section.heading)}</h3>{inner}")
        plots = "".join([*filter(None, map(self._pareto, COSTS)), *self._panels(detail=False)])
        first = [f'<div class="figures">{plots}</div>'] if plots else []
        shown[1:1] = [*self._strips(), *first, *self._all_rows()]
        shown += self._samples()
        if report.notes:
            items = "".join(f"<li>{escaped(note)}</li>" for note in report.notes)
            shown.append(f'<h3>Notes</h3><ul class="notes">{items}</ul>')
        if curves := "".join(self._panels(detail=True)):
            below.append(folded("Curves", f'<div class="figures">{curves}</div>'))
        return "".join([*shown, *below, *self._opened()])

    def _all_rows(self) -> list[str]:
        """One table of all rows with all columns."""
        found = [section.below for section in self.report.sections if section.of_results]
        if not found:
            return []
        anchors = [row.anchor for row in self.rows.values()]
        table = table_of(self.report.results, kind="all", anchors=anchors, headline=self._headline)
        return [f"<h3>All rows</h3>{table}{prose(found[0])}"]

    @property
    def _headline(self) -> str:
        return QUALITY[self.report.headline][0] if self.report.headline else ""

    def _opened(self) -> list[str]:
        if not self.report.rows:
            return []
        lines = self.report.results.to_dict("records")
        facts = [{str(name): str(value) for name, value in line.items()} for line in lines]
        rows = "".join(
            opened(row, self.rows[key].anchor, line, self._picture_link(row), self.room)
            for (key, row), line in zip(self._keyed(), facts, strict=True)
        )
        return [folded("Each row", rows, "rows")]

    def _keyed(self) -> list[tuple[str, Row]]:
        return list(zip(self.rows, self.report.rows, strict=True))

    def _panels(self, detail: bool) -> list[str]:
        """The panels of each plot, or those of details."""
        return [
            figure(
                plot.name,
                curves_figure(panel, plot, self.rows),
                f"{panel.title}: {plot.caption}" if panel.title else plot.caption,
            )
            for plot in self.report.plots
            if plot.detail is detail
            for panel in plot.panels
        ]

    def _pareto(self, label: str) -> str:
        """The headline metric of each row against a cost; empty where all cost the same."""
        report, points = self.report, []
        for row in report.finished:
            cost = row.finished[0].cost
            x = COSTS[label](cost) if cost and not row.diverged else None
            found, key = row.interval(report.headline), row.records[0].run_id
            if x and math.isfinite(x) and math.isfinite(found.mean):
                points.append(Point(x, found.mean, found.half_width, self.rows[key]))
        costs = [point.x for point in points]
        if len(points) < 2 or max(costs) < EQUAL * min(costs):
            return ""
        heading = plain_heading(report.headline)
        caption = f"{heading} against {label}; the rows of the front are named."
        if left := len(report.rows) - len(points):
            caption += f" {counted(left, 'row')} failed, diverged or lack this cost."
        return figure("pareto", pareto_figure(points, label, heading), caption)

    def _strips(self) -> list[str]:
        """The best rows' strips of samples; which have none, and how many the page leaves out."""
        strips, figures = strips_of(self.report, self.results), list[str]()
        cut = [strip for strip in strips if strip.picture]
        for strip in cut:
            if data := self.room.embedded(strip.png):
                anchor = self.rows[strip.best.row.records[0].run_id].anchor
                title = escaped(f"{strip.best.title}, {strip.best.kind}")
                figures.append(
                    f'<figure class="strip" data-row="{anchor}">'
                    f'<img alt="{escaped(strip.caption)}" src="{data}">'
                    f'<figcaption><a href="#{anchor}">{title}</a></figcaption></figure>'
                )
        left = len(cut) - len(figures)
        large = f"The page would be too large with {counted(left, 'more strip')}." if left else ""
        said = prose(" ".join(filter(None, (lacking(strips), large))))
        if not figures:
            return [said]
        return [f'{prose(SAMPLES)}<div class="figures">{"".join(figures)}</div>{said}']

    @cached_property
    def _pictures(self) -> dict[str, str]:
        """Pictures of samples by run id, best rows first; a sentence where one has no room."""
        best = [row.records[0].run_id for row in self.report.grids] if self.report.finished else []
        keyed = dict(self._keyed())
        found = {}
        for key in dict.fromkeys([*best, *keyed]):
            if picture := grid_file(keyed[key], self.report.task, self.results):
                caption, anchor = escaped(self.rows[key].name), self.rows[key].anchor
                if data := self.room.embedded(picture.read_bytes()):
                    image = f'<img alt="Samples of {caption}" src="{data}">'
                else:
                    place = escaped(str(picture))
                    image = f"<p>The page would be too large with this picture: {place}</p>"
                found[key] = (
                    f'<figure class="grid" id="picture-{anchor}" data-row="{anchor}">{image}'
                    f'<figcaption><a href="#{anchor}">{caption}</a></figcaption></figure>'
                )
        return found

    def _samples(self) -> list[str]:
        """The best rows' pictures of samples; then those of all others, folded."""
        if not self._pictures:
            return []
        best = {row.records[0].run_id for row in self.report.grids}
        first, others = (
            "".join(figure for key, figure in self._pictures.items() if (key in best) is wanted)
            for wanted in (True, False)
        )
        lacking = len(self.report.rows) - len(self._pictures)
        more = f" The results folder has none of {counted(lacking, 'row')}." if lacking else ""
        shown = f'<h3>Samples</h3><p>{GRIDS}{more}</p><div class="figures">{first}</div>'
        if not others:
            return [shown]
        return [shown, folded("Samples of the other rows", f'<div class="figures">{others}</div>')]

    def _picture_link(self, row: Row) -> str:
        """The link to a row's samples, which stand in the page once."""
        key = row.records[0].run_id
        if key in self._pictures:
            return f'<a href="#picture-{self.rows[key].anchor}">Samples from noise set 0</a>'
        return "<p>No picture of its samples lies in the results folder.</p>"
