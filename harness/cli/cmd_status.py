"""`harness status`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Column, Table

from harness.cli.console import Plain
from harness.cli.options import common
from harness.report.status import summary


@click.command("status")
@click.argument("results", default="results", type=click.Path(file_okay=False, path_type=Path))
@click.option("--watch", is_flag=True, help="Refresh every two seconds until interrupted.")
@common()
def status_command(results: Path, watch: bool, as_json: bool) -> None:
    """Show the runs under way below RESULTS, how far they are, what failed, and what is best."""
    found = summary(results)
    if as_json:
        under_way = [asdict(one) for one in found["working"]]
        click.echo(json.dumps({**found, "working": under_way}, indent=1))
        return
    console = Plain()
    if not watch:
        console.print(shown(found))
        return
    with Live(shown(found), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(2)
            live.update(shown(summary(results)), refresh=True)


def shown(found: dict[str, Any]) -> Group:
    """The tables that a person sees."""
    working = Table(
        Column("under way", overflow="fold", min_width=35), "stage", "done", "left", "log grew"
    )
    for one in found["working"]:
        done = f"{one.done}/{one.total}" if one.total else ""
        left = f"{one.seconds_left:.0f} s" if one.seconds_left is not None else ""
        working.add_row(one.run_id, one.stage, done, left, f"{one.silent_for:.0f} s ago")
    stopped = Table("interrupted; the same command resumes it")
    for run_id in found["interrupted"]:
        stopped.add_row(run_id)
    best = Table("task", "finished", "steps", "best of the runs made here")
    for task, facts in found["tasks"].items():
        for place, (steps, text) in enumerate(facts["best"].items() or [("", "")]):
            best.add_row(
                task if not place else "",
                str(facts["finished"]) if not place else "",
                str(steps),
                text,
            )
    failed = Table("failed", "reason")
    for run_id, reason in found["failed"].items():
        failed.add_row(run_id, reason)
    tables: list[RenderableType] = [
        table for table in (working, stopped, best, failed) if table.row_count
    ]
    return Group(*(tables or ["no runs yet"]))
