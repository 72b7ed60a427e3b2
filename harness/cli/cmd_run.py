"""`harness run`."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli.options import (
    MethodCommand,
    chosen,
    chosen_device,
    common,
    complete_methods,
    field_options,
    save_samples_option,
    track_option,
)
from harness.errors import UsageError
from harness.machine import busy_note
from harness.registry import registry_of
from harness.runs.config import RunConfig

if TYPE_CHECKING:
    import torch

    from harness.runs.preview import Preview
    from harness.runs.resolve import Resolved
    from harness.runs.saving import Form
    from harness.training.settings import Execution

RUN_FIELDS = [name for name in RunConfig.model_fields if name not in ("method", "options")]


@click.command("run", cls=MethodCommand)
@click.option(
    "--method",
    help="Name of a method; `harness list methods` lists them.",
    metavar="NAME",
    shell_complete=complete_methods,
)
@click.option(
    "--config",
    help="YAML file with the fields of a run; options on the command line override it.",
    metavar="FILE",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    help="KEY=VALUE for a field of the run or an option of the method.",
    metavar="KEY=VALUE",
)
@save_samples_option
@track_option
@click.option("--reuse", is_flag=True, help="Take a finished record that other code made.")
@click.option(
    "--shard",
    is_flag=True,
    help="Divide the trained networks over the ranks that torchrun started (FSDP2).",
)
@click.option(
    "--checkpoint-activations",
    is_flag=True,
    help="Let blocks keep their inputs alone and run again in the backward pass: less memory.",
)
@click.option(
    "--snapshots",
    type=click.IntRange(0, 1000),
    default=0,
    help="How often two averages of the student are written; `harness student ema` makes one of "
    "any width of them.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only show the config, which files are there, what is cached, cost, disk and time.",
)
@common(results=True, device=True)
@click.pass_context
def run_command(
    ctx: click.Context,
    method: str | None,
    config: str | None,
    assignments: tuple[str, ...],
    save_samples: str | None,
    track: str | None,
    reuse: bool,
    shard: bool,
    checkpoint_activations: bool,
    snapshots: int,
    dry_run: bool,
    as_json: bool,
    results: Path,
    device: str,
    **given: str | None,
) -> None:
    """Run one method on a task and print its row beside the reference.

    Options that you leave out keep the defaults of the method, or those that the task sets for it;
    `--method NAME --task TASK --help` shows both.
    """
    from harness import ranks
    from harness.runs.config import parse_config
    from harness.runs.resolve import resolve
    from harness.runs.saving import check_form
    from harness.tracking.tracked import check_tracker
    from harness.training.settings import Execution

    values = run_values(ctx.meta["file"], config, method, assignments, given)
    asked, where = parse_config(values), chosen_device(device)
    with ranks.joined(where):
        ranks.told_by_first(lambda: check_tracker(track))
        resolved = resolve(asked, results=results, device=where)
        execution = Execution(shard, checkpoint_activations, snapshots)
        if dry_run:
            ranks.told_by_first(
                lambda: show_dry_run(resolved, results, where, reuse, as_json, execution)
            )
            return
        form = check_form(save_samples, resolved.task)
        execute(resolved, results, where, reuse, as_json, form, execution, track)


def show_dry_run(
    resolved: Resolved,
    results: Path,
    device: torch.device,
    reuse: bool,
    as_json: bool,
    execution: Execution,
) -> None:
    """Prints what a run would do, or what its task lacks."""
    from harness.cli.plans import show_plan_if_needed
    from harness.runs.preview import preview

    if not show_plan_if_needed(resolved, as_json, execution):
        show_preview(preview(resolved, results, device, reuse), as_json)


for _option in field_options(RunConfig, RUN_FIELDS):
    run_command.params.append(_option)


def run_values(
    file: dict[str, Any],
    config: str | None,
    method: str | None,
    assignments: tuple[str, ...],
    given: dict[str, str | None],
) -> dict[str, Any]:
    """The fields of a run config: the file, overridden by options, overridden by `--set`."""
    values, options = dict(file), file.get("options") or {}
    if not isinstance(options, dict):
        raise UsageError(
            f"config {config}: options is {options!r}, "
            "but it should be a mapping from names to values"
        )
    pairs: dict[str, Any] = chosen(given)
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment} has no '='; give KEY=VALUE")
        pairs[key.replace("-", "_")] = value
    values |= {key: value for key, value in pairs.items() if key in RUN_FIELDS}
    values["options"] = {
        **options,
        **{key: value for key, value in pairs.items() if key not in RUN_FIELDS},
    }
    if method:
        values["method"] = method
    if "method" not in values:
        raise UsageError(
            f"no method is named; give --method, one of: {', '.join(registry_of('method').names())}"
        )
    return values


def execute(
    resolved: Resolved,
    results: Path,
    device: torch.device,
    reuse: bool,
    as_json: bool,
    save: Form | None = None,
    execution: Execution | None = None,
    track: str | None = None,
) -> None:
    """Runs and prints the row; before a new run it prints an estimate of the time."""
    from harness import ranks
    from harness.cli.console import Display, Plain
    from harness.cli.plans import LARGE
    from harness.progress import Both
    from harness.report.beside import beside
    from harness.report.console import print_results
    from harness.runs.plan import macs_a_pass, problem_of
    from harness.runs.preview import preview
    from harness.runs.run import Run, run
    from harness.tracking.tracked import tracked
    from harness.training.settings import Execution

    execution = execution or Execution()
    if ranks.count() == 1 and Run(resolved, results, device).finished_record(reuse) is None:
        with suppress(Exception):  # the run itself meets the same error, and records it
            if device.type != "cpu" or macs_a_pass(problem_of(resolved.task)) < LARGE:
                click.echo(estimate_text(preview(resolved, results, device, reuse)), err=True)
    if not ranks.is_first():
        run(resolved, results, device, reuse=reuse, save=save, execution=execution)
        return
    with Display(Plain(stderr=True)) as display:
        follower = Both(display, tracked(track, "", display.say))
        record, reference = run(
            resolved, results, device, display, reuse, save, execution, follower
        )
    if as_json:
        click.echo(record.model_dump_json(indent=1))
        return
    print_results([reference, record] if reference.run_id != record.run_id else [record], Plain())
    for sentence in beside(record):
        click.echo(sentence)
    click.echo(
        f"record: {results / 'runs' / record.run_id / 'record.json'}; "
        "samples: samples.png beside it\n"
        f"next: harness describe {record.method}; harness report {results}"
    )


def show_preview(found: Preview, as_json: bool) -> None:
    """Prints what a run would do."""
    import yaml

    if as_json:
        click.echo(json.dumps(vars(found), indent=1))
        return
    click.echo(f"{found.run_id}: {found.state}\n\nmethod: {found.method}")
    click.echo(yaml.safe_dump({"config": found.config, "options": found.options}, sort_keys=False))
    click.echo(f"{found.nfe:g} network passes and {found.macs_per_sample / 1e6:.1f} MMACs a sample")
    for name, there in found.cached.items():
        click.echo(f"{name}: {'there' if there else 'to be made'}")
    if found.disk:
        click.echo(found.disk)
    if found.seconds:
        click.echo(estimate_text(found))


def estimate_text(found: Preview) -> str:
    """How long a run takes, and its parts; a busy machine is mentioned."""
    import torch

    from harness.cli.console import duration

    total, parts = (
        sum(found.seconds.values()),
        ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found.seconds.items()),
    )
    start = "from its start " if found.state == "interrupted" else ""
    compiled = ", as if not compiled" if found.config.get("compile") else ""
    return (
        f"about {duration(total)} {start}on {torch.get_num_threads()} threads{compiled}: "
        f"{parts}{busy_note()}"
    )
