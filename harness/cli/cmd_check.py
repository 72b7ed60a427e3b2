"""`harness check`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
from rich.table import Table

from harness.cli.console import Display, Plain
from harness.cli.options import chosen_device, common
from harness.errors import CheckFailed, RunFailed, UsageError
from harness.records import Record, read_record
from harness.report.baseline import (
    Baseline,
    baseline_of,
    checkable,
    configs_of,
    read_baseline,
    write_baseline,
)
from harness.report.check import FAILS, Finding, compare, refuse_nothing, without_losses
from harness.report.rows import load_records
from harness.runs.run import Run
from harness.sweeps.sweep import plan


@click.command("check")
@click.option(
    "--baseline",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Such as baselines/smoke.json.",
)
@click.option(
    "--records",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Compare the records below this folder.",
)
@click.option(
    "--run", "to_run", is_flag=True, help="Make the baseline's runs first, and compare those."
)
@click.option(
    "--update",
    is_flag=True,
    help="Write the baseline anew after printing how it differs from the old one.",
)
@click.option(
    "--all", "show_all", is_flag=True, help="Also show comparisons that found no difference."
)
@common(results=True, device=True)
def check_command(
    baseline: Path,
    records: Path | None,
    to_run: bool,
    update: bool,
    show_all: bool,
    as_json: bool,
    results: Path,
    device: str,
) -> None:
    """Compare records with a baseline; exit code 1 if one fails.

    A record fails if it regressed, is missing or cannot be compared. Parameters, MACs, NFE and
    identities must be equal, first losses agree to one part in a thousand, and quality within the
    spread of seeds. Latency is shown, but never fails. Without --records and --run, the records
    below --results are compared.
    """
    if records is not None and to_run:
        raise UsageError(
            "--records compares existing records and --run makes new ones: give one of them"
        )
    if update and to_run and not baseline.exists():
        raise UsageError(
            f"there is no baseline {baseline} that names runs to make; "
            "give the records of a new one by --records"
        )
    found = _run(baseline, results, device) if to_run else load_records(records or results)
    old = _old_baseline(baseline, update)
    findings = compare(old, found) if old is not None else []
    _print(findings, old, show_all, as_json)
    if update:
        given = f" --records {records}" if records else " --run" if to_run else ""
        _update(baseline, found, f"harness check --baseline {baseline}{given} --update")
    else:
        refuse_nothing(findings)
        _refuse_failures(findings)


def _old_baseline(path: Path, update: bool) -> Baseline | None:
    """The baseline file; when it is to be replaced, it may be missing or broken."""
    if update and not path.exists():
        return None
    try:
        return read_baseline(path)
    except UsageError as error:
        if not update:
            raise
        click.echo(f"harness: {error}", err=True)
        return None


def _update(path: Path, records: list[Record], command: str) -> None:
    write_baseline(path, baseline_of(records, command))
    left_out = ", ".join(
        record.run_id for record in records if record.status == "finished" and not checkable(record)
    )
    click.echo(f"wrote {path}{f' without {left_out}' if left_out else ''}", err=True)


def _refuse_failures(findings: list[Finding]) -> None:
    failed = [finding for finding in findings if finding.state in FAILS]
    if failed:
        first = failed[0]
        raise CheckFailed(
            f"{len(failed)} of {len(findings)} comparisons fail, "
            f"first: {first.label}: {first.what} {first.state} "
            f"(baseline {first.expected}, here {first.found})"
        )


def _run(baseline: Path, results: Path, device: str) -> list[Record]:
    """The baseline's runs, made one after the other in this process."""
    console, where = Plain(stderr=True), chosen_device(device)
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


def _print(findings: list[Finding], old: Baseline | None, show_all: bool, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
        return
    shown = [finding for finding in findings if show_all or finding.state != "same"]
    if shown:
        table = Table("run", "what", "state", "baseline", "here", "allowed")
        for finding in shown:
            table.add_row(
                finding.label,
                finding.what,
                finding.state,
                finding.expected,
                finding.found,
                finding.allowed,
            )
        Plain().print(table)
    counts = {
        state: sum(finding.state == state for finding in findings)
        for state in dict.fromkeys(f.state for f in findings)
    }
    click.echo(
        f"{len(findings)} comparisons: "
        f"{', '.join(f'{count} {state}' for state, count in counts.items())}"
    )
    if old is not None and (count := without_losses(old)):
        click.echo(
            f"{count} of {len(old.runs)} runs of the baseline hold no first losses, "
            "so none are compared"
        )
