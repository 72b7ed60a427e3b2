"""`harness task new`: a task's file for one's own data and teacher."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli.cmd_teacher import checkpoint_options
from harness.cli.options import DEFAULT_TASK, chosen_device, common
from harness.errors import UsageError

if TYPE_CHECKING:
    from harness.networks.checkpoints import Teacher
    from harness.tasks import Task

folder_type = click.Path(file_okay=False, path_type=Path)


@click.group("task")
def task_group() -> None:
    """Write the file of a new task."""


@task_group.command("new")
@click.argument("name")
@click.option(
    "--images",
    type=folder_type,
    metavar="DIR",
    help="Folder of pictures with a subfolder for each class.",
)
@click.option(
    "--latents", type=folder_type, metavar="DIR", help="Folder that `harness data encode` wrote."
)
@click.option(
    "--autoencoder",
    type=folder_type,
    metavar="DIR",
    help="The autoencoder that made the latents, to decode samples.",
)
@click.option(
    "--set",
    "named",
    type=click.Choice(["cifar10", "digits", "fashion-mnist"]),
    help="A set that needs no folder.",
)
@click.option(
    "--image-size",
    type=click.IntRange(2, 2**14),
    metavar="N",
    help="Side to which pictures are cropped [default: the teacher's, or that of the pictures].",
)
@click.option(
    "--teacher",
    "checkpoint",
    metavar="CHECKPOINT",
    help="A teacher from others, as `harness teacher import` reads it [default: one is trained].",
)
@checkpoint_options
@click.option(
    "--like",
    default=DEFAULT_TASK,
    show_default=True,
    help="Task with the numbers of trajectories, evaluation and training.",
)
@common(device=True)
def task_new(
    name: str,
    images: Path | None,
    latents: Path | None,
    autoencoder: Path | None,
    named: str | None,
    image_size: int | None,
    checkpoint: str | None,
    kind: Any,
    num_heads: int | None,
    like: str,
    device: str,
    as_json: bool,
) -> None:
    """Write NAME.yaml here, a task for your own data and teacher, and check it.

    Give one of --images, --latents and --set. Every entry of the file has a comment.
    """
    from harness.networks.checkpoints import output_size, read_teacher
    from harness.runs.outlook import next_commands
    from harness.tasks.new import new_task

    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise UsageError(f"name is {name!r}, but must be of small letters, digits, - and _")
    if sum(source is not None for source in (images, latents, named)) != 1:
        raise UsageError("give one of --images DIR, --latents DIR and --set NAME")
    if autoencoder and not latents:
        raise UsageError("--autoencoder decodes latents: give it with --latents DIR")
    teacher = read_teacher(checkpoint, kind, num_heads) if checkpoint else None
    if teacher is not None:
        output_size(teacher)
    data = data_entry(images, latents, named, image_size, teacher)
    decoder = autoencoder_entry(autoencoder, latents) if autoencoder and latents else None
    task = new_task(Path.cwd(), name, data, teacher, like, decoder)
    commands = next_commands(task, f"{name}.yaml", chosen_device(device))
    show_task(task, teacher.facts if teacher else {}, commands, as_json)


def show_task(
    task: Task, facts: dict[str, str], commands: list[tuple[str, float]], as_json: bool
) -> None:
    """Prints what the new task has, and the next commands."""
    from harness.tasks.new import count

    data, split, file = task.spec.data, task.split, f"{task.spec.name}.yaml"
    if as_json:
        steps = [{"command": command, "seconds": seconds} for command, seconds in commands]
        entry = data.model_dump(mode="json")
        click.echo(json.dumps({"file": file, "data": entry, "next": steps}, indent=1))
        return
    click.echo(
        f"{file}: {len(split.train)} {'latents' if data.set == 'latents' else 'images'} of "
        f"{count(data.num_classes)}, shape {list(data.shape)}, and {len(split.held_out)} held out"
    )
    for title, text in facts.items():
        click.echo(f"teacher, {title}: {text}")
    click.echo("next, with times from one pass of each network here:")
    for command, seconds in commands:
        click.echo(f"  {command:60} {duration(seconds)}")


def data_entry(
    images: Path | None,
    latents: Path | None,
    named: str | None,
    image_size: int | None,
    teacher: Teacher | None,
) -> dict[str, Any]:
    """A task's entry `data`. Raises UsageError if the images cannot be read."""
    from harness.tasks.sources import SETS, of_images, of_latents

    path, mirrored = images or latents, False
    if named is not None:
        shape, classes = SETS[named]
    elif images is not None:
        if teacher is not None and teacher.shape[0] not in (1, 3):
            raise UsageError(
                f"the teacher denoises latents of shape {list(teacher.shape)}, not images: "
                "harness data encode makes latents of the images; give them as --latents"
            )
        shape, classes = of_images(
            images, image_size or (teacher.shape[1] or None if teacher else None)
        )
    else:
        assert latents is not None
        shape, classes, _, mirrored = of_latents(latents)
    where = {"path": place(path)} if path else {}
    return {
        "set": named or ("folder" if images else "latents"),
        **where,
        "split_seed": 0,
        "shape": list(shape),
        "num_classes": classes,
        **({"flip": True} if mirrored else {}),
    }


def autoencoder_entry(folder: Path, latents: Path) -> dict[str, Any]:
    """A task's entry `autoencoder`. Raises UsageError if another one made the latents."""
    from harness.files import file_hash
    from harness.tasks.sources import of_latents

    made_by, weights = of_latents(latents)[2], folder / "diffusion_pytorch_model.safetensors"
    if not weights.is_file():
        raise UsageError(f"there is no file {weights}")
    if file_hash(weights) != made_by["sha256"]:
        raise UsageError(
            f"{weights} is not the autoencoder that made {latents}, "
            f"whose SHA-256 is {made_by['sha256']}"
        )
    return {"folder": place(folder), **made_by}


def place(path: Path) -> str:
    """A path below the current folder as relative, any other as absolute."""
    inside = os.path.relpath(path)
    return str(path.resolve()) if inside.startswith("..") else inside


def duration(seconds: float) -> str:
    """A time in words."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {max(1, round(seconds))} s"
