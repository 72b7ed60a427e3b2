"""`harness report`."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pandas as pd

from harness.cli.options import common
from harness.errors import printable
from harness.files import write_text
from harness.records import Record
from harness.report.apart import apart_table
from harness.report.html import html_page
from harness.report.latex import latex_report
from harness.report.markdown import page
from harness.report.publish import publish
from harness.report.rows import load_records
from harness.report.searches import publish_searches
from harness.report.task_report import reports_of


@click.command("report")
@click.argument("results", default="results", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--format",
    "form",
    default="markdown",
    type=click.Choice(["markdown", "csv", "latex", "html"]),
    show_default=True,
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write instead of stdout.",
)
@click.option(
    "--publish",
    "to_publish",
    is_flag=True,
    help="Write records, pages and pictures to RESULTS/<task>/, to be committed.",
)
@common()
def report_command(
    results: Path, form: str, output: Path | None, to_publish: bool, as_json: bool
) -> None:
    """Print tables of all records below RESULTS."""
    records = load_records(results)
    if to_publish:
        for written in [*publish(records, results), *publish_searches(results)]:
            click.echo(f"wrote {written}", err=True)
        return
    if as_json:
        text = json.dumps([json.loads(record.model_dump_json()) for record in records], indent=1)
    else:
        text = rendered(form, records, results)
    if output:
        write_text(output, text)
    else:
        click.echo(text)


def rendered(form: str, records: list[Record], results: Path) -> str:
    """The report in one of its formats."""
    if form == "html":
        return html_page(records, results)
    reports = reports_of(records)
    if form == "markdown":
        return page(reports)
    if form == "latex":
        return "\n\n".join(map(latex_report, reports))
    tables = [
        table.assign(task=report.task)[["task", *table.columns]]
        for report in reports
        for table in (report.results, apart_table(report.apart))
    ]
    return (
        pd.concat(tables)
        .map(lambda x: printable(x) if isinstance(x, str) else x)
        .to_csv(index=False)
    )
