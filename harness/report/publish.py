"""What is committed of a results folder: records, pages and pictures of each task.

A task's `README.md` says what is best; `details.md` beside it has every row.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from harness.asides import write_aside
from harness.files import inside, write_text
from harness.records import Record, publish_records
from harness.report.findings import findings
from harness.report.labels import counted
from harness.report.markdown import link, notes_text, prose, section_text, table_text
from harness.report.pictures import write_plots
from harness.report.rows import Row
from harness.report.strips import SAMPLES, Strip, alternative, lacking, strips_of, write_strips
from harness.report.task_report import (
    GRIDS,
    TaskReport,
    agreement_section,
    claims_section,
    leaders_table,
    reports_of,
)
from harness.runs.locks import held

STRIPS = "best.png"
"""The picture of the best rows' samples, in a task's folder."""


def publish(records: Sequence[Record], results: Path) -> list[Path]:
    """Adds records to `<results>/<task>/` and writes its page and pictures anew.

    A page has the `findings.md` of its folder, if somebody has written one, with the numbers that
    it asks for (`harness/report/findings.py`). Processes that publish at once take turns, so that
    none drops what another one adds.

    Returns:
        The pages written, without those of details.
    """
    with held(results, "publish", wait=True):
        return _published(records, results)


def _published(records: Sequence[Record], results: Path) -> list[Path]:
    parts = results.resolve().parts
    place = "/".join(parts[parts.index("results") :]) if "results" in parts else results.name
    reports = reports_of(records)
    for report in reports:
        folder = inside(results / report.task, results)
        publish_records(folder, [record for record in records if record.task == report.task])
        write_plots(report.plots, folder)
        copy_grids([*report.grids, *(best.row for best in report.best)], results, folder)
        strips = strips_of(report, results)
        write_strips(strips, folder / STRIPS)
        write_text(folder / "README.md", _task_page(report, strips, folder, place))
        write_text(folder / "details.md", _details_page(report, place))
    write_text(results / "README.md", _index(reports, records, results, place))
    return [*(results / report.task / "README.md" for report in reports), results / "README.md"]


def _task_page(report: TaskReport, strips: Sequence[Strip], folder: Path, place: str) -> str:
    shown = [section_text(section, 2) for section in report.sections if not section.detail]
    grids = _grids(report, folder)
    parts = [
        f"# Results on {prose(report.task)}",
        _made_by(report, place),
        *shown[:1],
        *_strips(strips),
        *_plots(report, detail=False),
        *findings(folder, [report]),
        "[All rows, cost, diversity and curves](details.md)",
        *shown[1:],
        *([f"## Samples\n\n{GRIDS}\n\n{grids}"] if grids else []),
        *notes_text(report, 2),
    ]
    return "\n\n".join(parts) + "\n"


def _strips(strips: Sequence[Strip]) -> list[str]:
    """The picture of the best rows' samples, and which rows have none."""
    shown = any(strip.picture for strip in strips)
    image = [f"{SAMPLES}\n\n![{prose(alternative(strips))}]({STRIPS})"] if shown else []
    return [*image, *filter(None, [prose(lacking(strips))])]


def _details_page(report: TaskReport, place: str) -> str:
    parts = [
        f"# Details of results on {prose(report.task)}",
        f"[What is best, samples and notes](README.md). {_made_by(report, place)}",
        *(section_text(section, 2) for section in report.sections if section.detail),
        *_plots(report, detail=True),
    ]
    return "\n\n".join(parts) + "\n"


def _made_by(report: TaskReport, place: str) -> str:
    return f"Made by `harness report {place} --publish` from `{report.task}/records.jsonl`."


def _plots(report: TaskReport, detail: bool) -> list[str]:
    return [
        f"{prose(plot.caption)}\n\n![{plot.name}]({plot.name}.png)"
        for plot in report.plots
        if plot.detail is detail
    ]


def _grids(report: TaskReport, folder: Path) -> str:
    pictures = [(row, f"samples/{row.finished[0].run_id}.png") for row in report.grids]
    return "\n\n".join(
        f"{prose(grid_caption(row))}:\n\n![samples]({link(name)})"
        for row, name in pictures
        if (folder / name).is_file()
    )


def grid_caption(row: Row) -> str:
    """The row that a grid of samples shows."""
    steps, batch = row.training
    return f"{row.label}, {counted(row.num_steps)}" + (
        f", trained {steps} × {batch}" if steps else ""
    )


def copy_grids(rows: Sequence[Row], results: Path, folder: Path) -> None:
    """Copies the grids of the rows' first seeds to `<folder>/samples/`; deletes others there."""
    chosen = {f"{row.finished[0].run_id}.png" for row in rows}
    for old in inside(folder / "samples", folder).glob("*.png"):
        if old.name not in chosen:
            old.unlink()
    for name in sorted(chosen):
        source = inside(results / "runs" / name.removesuffix(".png") / "samples.png", results)
        if source.exists():
            write_aside(folder / "samples" / name, partial(shutil.copyfile, source))


def _index(
    reports: Sequence[TaskReport], records: Sequence[Record], results: Path, place: str
) -> str:
    counts = {report.task: sum(len(row.records) for row in report.rows) for report in reports}
    tasks = "\n".join(
        f"- [{prose(task)}]({link(task, 'README.md')}): {count} runs"
        for task, count in counts.items()
    )
    sections, best = [*agreement_section(reports), *claims_section(records)], leaders_table(reports)
    parts = [
        "# Results",
        f"Made by `harness report {place} --publish`.",
        *([table_text(best)] if len(best) else []),
        tasks,
        *findings(results, reports),
        *(section_text(section, 2) for section in sections),
    ]
    return "\n\n".join(parts) + "\n"
