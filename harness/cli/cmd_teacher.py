"""`harness teacher train`, `verify` and `levels`. Floor 11."""

from __future__ import annotations

import json
from pathlib import Path

import click
import yaml
from rich.console import Console

from harness.cli.console import Display
from harness.cli.options import chosen_device, common
from harness.runs.teacher_training import search, train_networks, verify
from harness.tasks import load_task


@click.group("teacher")
def teacher_group() -> None:
    """Train or verify the networks that ship with a task; search for a sampler's levels."""


@teacher_group.command("train")
@click.option("--task", default="digits", show_default=True)
@common(results=True, device=True)
def teacher_train(task: str, results: Path, device: str, as_json: bool) -> None:
    """Train a task's own feature network and teacher, and scan guidance; resumes where it was interrupted."""
    with Display(Console(stderr=True)) as display:
        found = load_task(task)
        made = train_networks(found, results / "teachers" / found.spec.name, chosen_device(device), display)
    if as_json:
        click.echo(json.dumps({str(m.path): m.card for m in made}, indent=1))
        return
    for m in made:
        click.echo(f"{m.path}\n  sha256: {m.sha256}\n{yaml.safe_dump(m.card['quality'], sort_keys=False, indent=2)}")


@teacher_group.command("verify")
@click.option("--task", default="digits", show_default=True)
@common(device=True)
def teacher_verify(task: str, device: str, as_json: bool) -> None:
    """Measure the shipped networks again and compare with their cards; exit code 1 if one differs."""
    with Display(Console(stderr=True)) as display:
        lines = verify(load_task(task), chosen_device(device), display)
    click.echo(json.dumps(lines, indent=1) if as_json else "\n".join(lines))


@teacher_group.command("levels")
@click.option("--task", default="digits", show_default=True)
@click.option("--num-steps", type=int, default=4, show_default=True)
@click.option("--solver", default="ddim", show_default=True, help="harness list solvers lists them.")
@click.option("--count", type=click.IntRange(1), default=64, show_default=True, help="Trajectories to search with.")
@common(device=True)
def teacher_levels(task: str, num_steps: int, solver: str, count: int, device: str, as_json: bool) -> None:
    """Search for the levels on which few steps end nearest to the full grid; they go to --levels of method teacher."""
    found = search(load_task(task), solver, num_steps, count, chosen_device(device))
    levels = [round(1000 * float(level)) for level in found.levels[1:-1]][::-1]
    told = {"levels": levels, "mse": found.mse, "mse_equally_spaced": found.equal_mse, "tried": found.tried, "trajectories": count}
    if as_json:
        click.echo(json.dumps(told, indent=1))
        return
    click.echo(f"--levels {','.join(map(str, levels))}" if levels else "one step has no levels to choose")
    click.echo(f"mean square from the full grid's ends: {found.mse:.5f}, equally spaced {found.equal_mse:.5f}; "
               f"{found.tried} sets of levels tried on {count} trajectories")  # fmt: skip
