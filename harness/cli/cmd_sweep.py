"""`harness sweep`: a grid of runs, or searches; `harness _job`: one of them in a child process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from harness.cli.console import Display, Plain
from harness.cli.options import chosen_device, common, say, track_option
from harness.documents import parse_yaml, read_yaml
from harness.errors import RunFailed, UsageError
from harness.machine import busy_note
from harness.progress import Both
from harness.runs.preview import estimate
from harness.runs.resolve import Resolved
from harness.runs.run import Run
from harness.sweeps.child import UNTRACKED, Order, Tracking, stop_with_driver
from harness.sweeps.driver import Driver
from harness.sweeps.engines import Engine, Local, Ray, Slurm, shares_of
from harness.sweeps.sweep import Cell, expand, plan, run_sweep
from harness.tracking.tracked import check_tracker, tracked


@dataclass(frozen=True)
class Place:
    """Where and by what the runs of a sweep are made; the fields are options of the command."""

    results: Path
    device: torch.device
    engine: str
    workers: int
    parameters: Mapping[str, Any]
    reuse: bool
    tracking: Tracking = UNTRACKED

    def driver(self) -> Driver[Any]:
        """The driver of the engine that was chosen. Raises UsageError where it cannot be used."""
        return Driver(self._engine(), self.workers)

    def _engine(self) -> Engine:
        cuda = self.device.type == "cuda"
        if self.engine == "slurm":
            return Slurm(
                self.results / "jobs", {**({"gpus_per_node": 1} if cuda else {}), **self.parameters}
            )
        if self.engine == "ray":
            return Ray({**({"num_gpus": 1} if cuda else {}), **self.parameters})
        return Local(shares_of(self.device, self.workers))


@click.command("sweep")
@click.argument("file", metavar="FILE")
@click.option(
    "--dry-run", is_flag=True, help="Only show which runs are there and which are missing."
)
@click.option(
    "--estimate",
    "timing",
    is_flag=True,
    help="With --dry-run: time a step of each setting and estimate the whole.",
)
@click.option(
    "--reuse", is_flag=True, help="Take finished records that other code made, published ones too."
)
@track_option
@click.option(
    "--engine",
    default="local",
    type=click.Choice(["local", "slurm", "ray"]),
    show_default=True,
    help="What runs the runs: processes of this machine, jobs of Slurm, or tasks of a Ray cluster.",
)
@click.option(
    "--workers",
    default=1,
    type=click.IntRange(1, 256),
    show_default=True,
    help="Runs that are made at once.",
)
@click.option(
    "--engine-set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="A parameter of submitit, such as timeout_min=60, or of a Ray task, such as num_cpus=4.",
)
@common(results=True, device=True)
def sweep_command(
    file: str,
    dry_run: bool,
    timing: bool,
    reuse: bool,
    track: str | None,
    engine: str,
    workers: int,
    assignments: tuple[str, ...],
    as_json: bool,
    results: Path,
    device: str,
) -> None:
    """Make all runs of a sweep file; finished ones are skipped and interrupted ones resumed.

    A file with `search` is a search by Optuna. After an interruption the same command goes on.
    """
    if timing and not dry_run:
        raise UsageError("--estimate belongs to --dry-run: give both")
    if assignments and engine == "local":
        raise UsageError("--engine-set belongs to --engine slurm or ray: give one of them")
    check_tracker(track)
    content, tracking = read_yaml(Path(file)), Tracking(name=track, group=Path(file).stem)
    place = Place(
        results, chosen_device(device), engine, workers, parameters_of(assignments), reuse, tracking
    )
    if "search" in content:
        if timing:
            raise UsageError(
                f"--estimate times the runs of a grid, but {file} is a search, "
                "whose runs are not known yet: leave it out"
            )
        # Imported here because Optuna takes long to import.
        from harness.cli.searches import run_searches

        run_searches(content, file, place, dry_run, as_json)
        return
    cells = plan(expand(content, f"sweep file {file}"), results, place.device, reuse)
    if dry_run:
        show_cells(cells, place, timing, as_json)
    else:
        run_cells(cells, place, as_json)


def parameters_of(assignments: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE pairs, values as in YAML. Raises UsageError without a '='."""
    found = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f"--engine-set {assignment} has no '='; give KEY=VALUE")
        try:
            found[key] = parse_yaml(value)
        except ValueError as error:
            raise UsageError(f"--engine-set {key} is no value in YAML: {error}") from error
    return found


def show_cells(cells: list[Cell], place: Place, timing: bool, as_json: bool) -> None:
    """Prints which runs are there and which are missing."""
    lines = [
        {
            "run_id": c.resolved.run_id,
            "seed": c.resolved.settings.seed,
            "steps": c.resolved.settings.total_steps,
            "state": "finished" if c.record else "to run",
            **c.config.model_dump(exclude_unset=True),
        }
        for c in cells
    ]
    if as_json:
        click.echo(json.dumps(lines, indent=1))
        return
    for line in lines:
        click.echo(
            f"{line['state']:9} {line['run_id']:40} seed {line['seed']} "
            f"{json.dumps(line.get('options', {}))}"
        )
    missing = [cell for cell in cells if cell.record is None]
    others = sum(cell.published for cell in missing)
    hint = f"; {others} are published, made by other code: --reuse takes them" if others else ""
    click.echo(f"{len(missing)} of {len(cells)} runs are missing{hint}")
    if timing and missing:
        click.echo(estimate_text([cell.resolved for cell in missing], place))


def estimate_text(missing: list[Resolved], place: Place) -> str:
    """How long the missing runs take by the sweep's workers, with the minutes of each part.

    Runs of this machine's CPU are timed on a worker's share of the threads.
    """
    whole, at_once = torch.get_num_threads(), min(place.workers, len(missing))
    if place.engine == "local" and place.device.type == "cpu":
        torch.set_num_threads(max(1, whole // place.workers))
    try:
        parts, threads = estimate(missing, place.results, place.device), torch.get_num_threads()
    finally:
        torch.set_num_threads(whole)
    minutes = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in parts.items())
    runs = "one run at a time" if at_once == 1 else f"{at_once} runs at a time"
    total = sum(parts.values()) / at_once / 60
    return (
        f"about {total:.0f} minutes, {runs} on {threads} threads each; "
        f"minutes of work: {minutes}{busy_note()}"
    )


def run_cells(cells: list[Cell], place: Place, as_json: bool) -> None:
    """Makes the missing runs of a grid. Raises RunFailed if some fail."""
    driver = place.driver()
    follower = tracked(place.tracking.name, place.tracking.group, say)
    for cell in cells:
        if cell.record is not None:  # so that the sweep's group is whole
            Run(cell.resolved, place.results, place.device, follower=follower).tell(cell.record)
    records = run_sweep(
        cells, place.results, place.device, driver, place.reuse, say, place.tracking
    )
    if as_json:
        click.echo(
            json.dumps([json.loads(record.model_dump_json()) for record in records], indent=1)
        )
        return
    failed = [record.run_id for record in records if record.status == "failed"]
    lost = f", processes that died on the way: {len(driver.lost)}" if driver.lost else ""
    click.echo(
        f"{len(records) - len(failed)} of {len(cells)} runs finished, {len(failed)} failed{lost}; "
        f"`harness report {place.results}` shows them"
    )
    if failed:
        raise RunFailed(f"{len(failed)} of {len(cells)} runs failed: {', '.join(failed)}")


@click.command("_job", hidden=True)
@click.argument("order")
@common()
def job_command(order: str, as_json: bool) -> None:
    """Make the run that a driver of `harness sweep` asks for, and stop when stdin closes."""
    stop_with_driver()
    asked = Order.model_validate_json(order)
    console = Plain(stderr=True, force_terminal=False if asked.name else None)
    with Display(console, name=asked.name) as display:
        tracking = asked.tracking
        follower = Both(display, tracked(tracking.name, tracking.group, display.say))
        asked.execute(chosen_device(asked.device), display, follower)
