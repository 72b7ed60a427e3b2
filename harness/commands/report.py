"""`harness report`. Floor 11."""

from __future__ import annotations

import json
from pathlib import Path

import click

from harness.options import common
from harness.report.markdown import page, publish
from harness.report.tables import load_records, results_table, rows_of


@click.command("report")
@click.argument("results", default="results", type=click.Path(file_okay=False, path_type=Path))
@click.option("--format", "form", default="markdown", type=click.Choice(["markdown", "csv"]), show_default=True)
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
        text = page(records) if form == "markdown" else results_table(rows_of(records)).to_csv(index=False)
    if output:
        from harness.files import write_text

        write_text(output, text)
    else:
        click.echo(text)
