"""`harness run`. Floor 11."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import click
import torch
import yaml
from rich.console import Console

from harness.cli.console import Display
from harness.cli.options import RUN_FIELDS, MethodCommand, chosen_device, common, field_options
from harness.errors import UsageError
from harness.methods import METHODS
from harness.report.console import print_results
from harness.runs.config import RunConfig, parse_config, resolve
from harness.runs.preview import Preview, preview
from harness.runs.run import Run, run


@click.command("run", cls=MethodCommand)
@click.option("--method", help="Name of the method; `harness list methods` lists them.", metavar="NAME")
@click.option("--config", help="YAML file with the fields of a run; options given here count more.", metavar="FILE")
@click.option(
    "--set", "assignments", multiple=True, help="KEY=VALUE for a field of the run or an option of the method.", metavar="KEY=VALUE"
)
@click.option("--reuse", is_flag=True, help="Take a finished record that other code made.")
@click.option("--dry-run", is_flag=True, help="Only show the settled config, what is cached, MACs and an estimate of the time.")
@common(results=True, device=True)
@click.pass_context
def run_command(ctx: click.Context, method: str | None, config: str | None, assignments: tuple[str, ...], reuse: bool, dry_run: bool,
                as_json: bool, results: Path, device: str, **given: str | None) -> None:  # fmt: skip
    """Run one method on a task and print its row beside the reference's.

    Where nothing is said, a method's options are its own defaults, or the task's: `--method NAME --task TASK --help` shows both.
    """
    values = dict(ctx.meta["file"])
    options = values.pop("options", None) or {}
    if not isinstance(options, dict):
        raise UsageError(f"config {config}: options is {options!r}, but it should be a mapping from names to values")
    options = dict(options)
    pairs = {name: value for name, value in given.items() if value is not None}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment} has no '='; give KEY=VALUE")
        pairs[key.replace("-", "_")] = value
    for key, value in pairs.items():
        (values if key in RUN_FIELDS else options)[key] = value
    if method:
        values["method"] = method
    if "method" not in values:
        raise UsageError(f"no method is named; give --method, one of: {', '.join(METHODS.names())}")
    asked = parse_config({**values, "options": options})
    where = chosen_device(device)
    resolved = resolve(asked, results=results, device=where)
    if dry_run:
        show_preview(preview(resolved, results, where, reuse), as_json)
        return
    if Run(resolved, results, where).finished_record(reuse) is None:
        with suppress(Exception):  # what fails here fails in the run, which notes it
            click.echo(time_told(preview(resolved, results, where, reuse)), err=True)
    console = Console(stderr=True)
    with Display(console) as display:
        record, reference = run(resolved, results, where, display, reuse)
    if as_json:
        click.echo(record.model_dump_json(indent=1))
        return
    shown = [reference, record] if reference.run_id != record.run_id else [record]
    print_results(shown, Console())
    click.echo(f"record: {results / 'runs' / record.run_id / 'record.json'}; samples: samples.png beside it")


for _option in field_options(RunConfig, RUN_FIELDS):
    run_command.params.append(_option)


def show_preview(found: Preview, as_json: bool) -> None:
    """Prints what a run would do."""
    if as_json:
        click.echo(json.dumps(vars(found), indent=1))
        return
    click.echo(f"{found.run_id}: {found.state}\n\nmethod: {found.method}")
    click.echo(yaml.safe_dump({"config": found.config, "options": found.options}, sort_keys=False))
    click.echo(f"{found.nfe:g} network passes and {found.macs_per_sample / 1e6:.1f} MMACs a sample")
    for name, there in found.cached.items():
        click.echo(f"{name}: {'there' if there else 'to be made'}")
    if found.seconds:
        click.echo(time_told(found))


def time_told(found: Preview) -> str:
    """How long a run will take, and its parts."""
    whole, parts = sum(found.seconds.values()), ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found.seconds.items())
    told = f"{whole:.0f} s" if whole < 300 else f"{whole / 60:.0f} minutes"
    start = "from its start " if found.state == "interrupted" else ""
    compiled = ", as if not compiled" if found.config.get("compile") else ""
    return f"about {told} {start}on {torch.get_num_threads()} threads{compiled}, metrics not counted: {parts}"
