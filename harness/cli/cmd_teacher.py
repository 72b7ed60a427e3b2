"""`harness teacher train`, `verify` and `levels`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from harness.cli.options import DEFAULT_TASK, chosen_device, common

task_option = click.option(
    "--task", default=DEFAULT_TASK, show_default=True, help="Name of a task, or a task file."
)


@click.group("teacher")
def teacher_group() -> None:
    """Train or verify the networks of a task, or search for the levels of a sampler."""


@teacher_group.command("train")
@task_option
@common(results=True, device=True)
def teacher_train(task: str, results: Path, device: str, as_json: bool) -> None:
    """Train the feature network and the teacher of a task, then scan guidance.

    The same command resumes after an interruption.
    """
    import yaml
    from rich.console import Console

    from harness.cli.console import Display
    from harness.runs.teacher_training import train_networks
    from harness.tasks import load_task

    with Display(Console(stderr=True)) as display:
        found = load_task(task)
        made = train_networks(
            found, results / "teachers" / found.spec.name, chosen_device(device), display
        )
    if as_json:
        click.echo(json.dumps({str(m.path): m.card for m in made}, indent=1))
        return
    for m in made:
        click.echo(
            f"{m.path}\n  sha256: {m.sha256}\n"
            f"{yaml.safe_dump(m.card['quality'], sort_keys=False, indent=2)}"
        )


@teacher_group.command("verify")
@task_option
@common(device=True)
def teacher_verify(task: str, device: str, as_json: bool) -> None:
    """Measure the networks of a task again; exit code 1 if one differs from its card."""
    from rich.console import Console

    from harness.cli.console import Display
    from harness.runs.teacher_training import verify
    from harness.tasks import load_task

    with Display(Console(stderr=True)) as display:
        lines = verify(load_task(task), chosen_device(device), display)
    click.echo(json.dumps(lines, indent=1) if as_json else "\n".join(lines))


@teacher_group.command("levels")
@task_option
@click.option("--num-steps", type=int, default=4, show_default=True, help="Sampling steps.")
@click.option(
    "--solver",
    default="ddim",
    show_default=True,
    help="Name of a solver; `harness list solvers` lists them.",
)
@click.option(
    "--count",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Number of trajectories to search with.",
)
@common(device=True)
def teacher_levels(
    task: str, num_steps: int, solver: str, count: int, device: str, as_json: bool
) -> None:
    """Search for the levels on which few steps end nearest to the full grid.

    Method teacher takes them as --levels.
    """
    from harness.runs.teacher_training import search
    from harness.tasks import load_task

    found = search(load_task(task), solver, num_steps, count, chosen_device(device))
    levels = [round(1000 * float(level)) for level in found.levels[1:-1]][::-1]
    facts = {
        "levels": levels,
        "mse": found.mse,
        "mse_equally_spaced": found.equal_mse,
        "tried": found.tried,
        "trajectories": count,
    }
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    click.echo(
        f"--levels {','.join(map(str, levels))}" if levels else "one step leaves no level to choose"
    )
    click.echo(
        f"mean squared distance to the end of the full grid: {found.mse:.5f}, "
        f"with equally spaced levels {found.equal_mse:.5f}; "
        f"{found.tried} sets of levels tried on {count} trajectories"
    )
