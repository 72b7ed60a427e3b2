"""`harness report`. Floor 11."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pandas as pd

from harness.cli.options import common
from harness.records import Record
from harness.report.latex import latex_table
from harness.report.markdown import by_task, page, publish
from harness.report.rows import load_records, rows_of
from harness.report.tables import KEYS, QUALITY, results_table

SHOWN = {*(heading for heading, _ in QUALITY.values()), "NFE", "MMACs / sample", "status"}
"""Columns of a table for a paper, beside the keys."""


@click.command("report")
@click.argument("results", default="results", type=click.Path(file_okay=False, path_type=Path))
@click.option("--format", "form", default="markdown", type=click.Choice(["markdown", "csv", "latex", "html"]), show_default=True)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write instead of stdout.")
@click.option("--publish", "to_publish", is_flag=True, help="Copy records and grids to RESULTS/<task>/ and write its README.md.")
@common()
def report_command(results: Path, form: str, output: Path | None, to_publish: bool, as_json: bool) -> None:
    """Print the tables of all records below RESULTS."""
    records = load_records(results)
    if to_publish:
        for written in publish(records, results):
            click.echo(f"wrote {written}", err=True)
        return
    if as_json:
        text = json.dumps([json.loads(record.model_dump_json()) for record in records], indent=1)
    else:
        text = written_as(form, records, results)
    if output:
        from harness.files import write_text

        write_text(output, text)
    else:
        click.echo(text)


def written_as(form: str, records: list[Record], results: Path) -> str:
    """The report in one of its forms."""
    if form == "markdown":
        return page(records)
    if form == "html":
        from harness.report.html import html_page

        return html_page(records, results)
    tables = {task: results_table(rows_of(found)) for task, found in by_task(records).items()}
    if form == "latex":
        return "\n\n".join(
            latex_table(table[[*KEYS, *(c for c in table if c in SHOWN)]], f"Results on {task}.") for task, table in tables.items()
        )
    return pd.concat([table.assign(task=task)[["task", *table.columns]] for task, table in tables.items()]).to_csv(index=False)
