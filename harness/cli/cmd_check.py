"""`harness check`. Floor 11."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from harness.cli.console import Display
from harness.cli.options import chosen_device, common
from harness.errors import CheckFailed, RunFailed, UsageError
from harness.records import Record, read_record
from harness.report.check import (
    FAILS,
    Finding,
    baseline_of,
    checkable,
    compare,
    configs_of,
    read_baseline,
    refuse_nothing,
    without_losses,
    write_baseline,
)
from harness.report.rows import load_records
from harness.runs.run import Run
from harness.sweeps.sweep import plan


@click.command("check")
@click.option(
    "--baseline", required=True, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Such as baselines/digits.json."
)
@click.option("--records", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Compare the records below this folder.")
@click.option("--run", "to_run", is_flag=True, help="Make the baseline's runs here first, and compare those.")
@click.option("--update", is_flag=True, help="Write the baseline anew, and print in what it differs from the old one.")
@click.option("--all", "show_all", is_flag=True, help="Show what is the same too.")
@common(results=True, device=True)
def check_command(baseline: Path, records: Path | None, to_run: bool, update: bool, show_all: bool, as_json: bool, results: Path,
                  device: str) -> None:  # fmt: skip
    """Compare records with a baseline; exit code 1 if one regressed, is missing or cannot be compared.

    Parameters, MACs, NFE and identities must be equal, first losses to one part in a thousand, quality by the spread of seeds; latency is
    shown alone. Without --records and --run the records below --results count.
    """
    if records is not None and to_run:
        raise UsageError("--records compares what is there and --run makes it: give one")
    if update and to_run and not baseline.exists():
        raise UsageError(f"there is no baseline {baseline} whose runs could be made; give --records of those that it should have")
    found = _run(baseline, results, device) if to_run else load_records(records or results)
    old = None
    if baseline.exists() or not update:
        try:
            old = read_baseline(baseline)
        except UsageError as error:  # from another version, which an update replaces
            if not update:
                raise
            click.echo(f"harness: {error}", err=True)
    findings = compare(old, found) if old is not None else []
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _show(findings, show_all)
        if old is not None and (count := without_losses(old)):
            click.echo(f"{count} of {len(old.runs)} runs of the baseline hold no first losses: none are compared")
    if update:
        given = f" --records {records}" if records else " --run" if to_run else ""
        write_baseline(baseline, baseline_of(found, f"harness check --baseline {baseline}{given} --update"))
        left_out = ", ".join(record.run_id for record in found if record.status == "finished" and not checkable(record))
        click.echo(f"wrote {baseline}{f' without {left_out}' if left_out else ''}", err=True)
        return
    refuse_nothing(findings)
    failed = [finding for finding in findings if finding.state in FAILS]
    if failed:
        first = failed[0]
        raise CheckFailed(f"{len(failed)} of {len(findings)} comparisons fail, first: {first.label}: {first.what} {first.state} "
                          f"(baseline {first.expected}, here {first.found})")  # fmt: skip


def _run(baseline: Path, results: Path, device: str) -> list[Record]:
    """The baseline's runs, made one after the other in this process."""
    console, where = Console(stderr=True), chosen_device(device)
    records = []
    with Display(console) as display:
        for cell in plan(configs_of(read_baseline(baseline)), results, where):
            run = Run(cell.resolved, results, where, display)
            try:
                records.append(cell.record or run.execute(wait=True))
            except RunFailed as error:
                console.print(str(error), highlight=False)
                records.append(read_record(run.folder / "record.json"))
    return records


def _show(findings: list[Finding], show_all: bool) -> None:
    shown = [finding for finding in findings if show_all or finding.state != "same"]
    if shown:
        table = Table("run", "what", "state", "baseline", "here", "allowed")
        for finding in shown:
            table.add_row(finding.label, finding.what, finding.state, finding.expected, finding.found, finding.allowed)
        Console().print(table)
    counts = {state: sum(finding.state == state for finding in findings) for state in dict.fromkeys(f.state for f in findings)}
    click.echo(f"{len(findings)} comparisons: {', '.join(f'{count} {state}' for state, count in counts.items())}")
