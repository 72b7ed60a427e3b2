"""`harness teacher import`, `train`, `verify` and `levels`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli.options import DEFAULT_TASK, chosen_device, common
from harness.errors import UsageError

if TYPE_CHECKING:
    from harness.runs.teacher_training import Made
    from harness.tasks import Task

task_option = click.option(
    "--task", default=DEFAULT_TASK, show_default=True, help="Name of a task, or a task file."
)


@click.group("teacher")
def teacher_group() -> None:
    """Import, train or verify the networks of a task, or search for the levels of a sampler."""


def checkpoint_options(command: Callable) -> Callable:
    """The options that say what a checkpoint does not."""
    command = click.option(
        "--num-heads",
        type=click.IntRange(1, 2**12),
        metavar="N",
        help="Attention heads, where the width does not tell: only DiT's own sizes do.",
    )(command)
    return click.option(
        "--kind",
        type=click.Choice(["dit", "sit"]),
        help="What official weights are, where neither the file's options nor its name tell: "
        "dit predicts noise, sit velocity.",
    )(command)


@teacher_group.command("import")
@click.argument("source", metavar="FILE|FOLDER|HUB/NAME")
@click.option(
    "--task",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE.yaml",
    help="Task file that gets the teacher; the weights go to weights/ beside it.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.safetensors",
    help="Write the weights alone, and print the task's entries.",
)
@checkpoint_options
@common()
def teacher_import(
    source: str,
    task: Path | None,
    out: Path | None,
    kind: Any,
    num_heads: int | None,
    as_json: bool,
) -> None:
    """Read a teacher from others and give it to a task.

    Known are official DiT and SiT files (.pt, .safetensors), folders of diffusers (a pipeline or a
    transformer of DiT, PixArt, SD3, FLUX, Sana or Qwen-Image), such a repository on the hub by
    name, and own files.
    Of a .pt only tensors, plain values and argparse.Namespace are read, so that no code runs.
    """
    from harness.networks.checkpoints import output_size, read_teacher, write_teacher
    from harness.tasks.adopt import adopt_teacher, check_free, teacher_entries

    if (task is None) == (out is None):
        raise UsageError("give either --task FILE.yaml or --out FILE.safetensors")
    teacher = read_teacher(source, kind, num_heads)
    size = output_size(teacher)
    if out is not None:
        check_free(out)
        path, sha256 = out, write_teacher(teacher, out)
    else:
        assert task is not None
        path, sha256 = adopt_teacher(task, teacher)
    facts = {**teacher.facts, "weights": f"{teacher.parameters:,} numbers, equal to the source's"}
    if size is not None:
        facts["outputs"] = f"finite at t = 1, 0.5 and 0.001, root mean square {size:.4g}"
    facts["written"] = str(path)
    show_import(facts, teacher_entries(teacher, str(path), sha256), task, as_json)


def show_import(
    facts: dict[str, str], entries: dict[str, Any], task: Path | None, as_json: bool
) -> None:
    """Prints what was read, and what to do next or what to write into a task."""
    from harness.tasks import load_task
    from harness.tasks.edit import entry_text

    if as_json:
        click.echo(json.dumps({**facts, "entries": entries}, indent=1))
        return
    for name, text in facts.items():
        click.echo(f"{name:>18}: {text}")
    if task is None:
        click.echo("\n".join(entry_text(name, value) for name, value in entries.items()))
        return
    features = load_task(str(task)).spec.features
    step = "teacher train" if features and not features.sha256 else "run --method ard --dry-run"
    click.echo(f"{task} has a new network, schedule, prediction_type and teacher")
    click.echo(f"next: harness {step} --task {task}")


@teacher_group.command("train")
@task_option
@common(results=True, device=True)
def teacher_train(task: str, results: Path, device: str, as_json: bool) -> None:
    """Train the feature network and the teacher of a task, then scan guidance.

    The same command resumes after an interruption. A task file that lacks networks gets them, with
    their sha256 and the guidance scale of the best FID.
    """
    import yaml

    from harness.cli.console import Display, Plain
    from harness.runs.teacher_training import train_networks
    from harness.tasks import load_task

    with Display(Plain(stderr=True)) as display:
        found = load_task(task)
        made = train_networks(
            found, results / "teachers" / found.spec.name, chosen_device(device), display
        )
    added = into_file(found, task, made)
    if as_json:
        click.echo(json.dumps({str(m.path): m.card for m in made}, indent=1))
        return
    for m in made:
        click.echo(
            f"{m.path}\n  sha256: {m.sha256}\n"
            f"{yaml.safe_dump(m.card['quality'], sort_keys=False, indent=2)}"
        )
    if added:
        click.echo(f"{task} has them now: {', '.join(added)}")


def into_file(task: Task, name: str, made: Sequence[Made]) -> list[str]:
    """Gives a user's task file the trained networks that it lacks; the entries that were set."""
    from harness.tasks.adopt import adopt_encoder, adopt_trained

    missing = [m for m in made if task.trained(m.part).sha256 is None]
    if not missing or not name.endswith((".yaml", ".yml")):
        return []
    more: dict[str, Any] = {}
    for m in missing:
        if m.part == "teacher":
            scale = m.card["quality"]["best_guidance_scale"]
            more["guidance"] = {**task.spec.guidance.model_dump(exclude_none=True), "scale": scale}
        if m.encoder:
            more["prompts"] = adopt_encoder(Path(name), Path(m.encoder.file), m.encoder.sha256)
    adopt_trained(Path(name), {m.part: (m.path, m.sha256) for m in missing}, **more)
    return [*(m.part for m in missing), *more]


@teacher_group.command("verify")
@task_option
@common(device=True)
def teacher_verify(task: str, device: str, as_json: bool) -> None:
    """Measure the networks of a task again; exit code 1 if one differs from its card."""

    from harness.cli.console import Display, Plain
    from harness.runs.teacher_training import verify
    from harness.tasks import load_task

    with Display(Plain(stderr=True)) as display:
        lines = verify(load_task(task), chosen_device(device), display)
    click.echo(json.dumps(lines, indent=1) if as_json else "\n".join(lines))


@teacher_group.command("levels")
@task_option
@click.option(
    "--num-steps",
    type=click.IntRange(1, 1000),
    default=4,
    show_default=True,
    help="Sampling steps.",
)
@click.option(
    "--solver",
    default="ddim",
    show_default=True,
    help="Name of a solver; `harness list solvers` lists them.",
)
@click.option(
    "--count",
    type=click.IntRange(1, 10**6),
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
