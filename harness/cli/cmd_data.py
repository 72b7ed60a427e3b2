"""`harness data encode` and `harness data prompts`."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import click

from harness.cli.options import chosen_device, common

MANY = click.IntRange(1, 2**24)
"""Items in a file or in a batch."""
F = TypeVar("F", bound=Callable[..., Any])


@click.group("data")
def data_group() -> None:
    """Prepare the images and the prompts of a task."""


def storing(what: str, dtype: str, shard_size: int, batch_size: int) -> Callable[[F], F]:
    """The options that say how ranks store what they encode, with these defaults."""
    options = (
        click.option(
            "--dtype",
            type=click.Choice(["float32", "float16"]),
            default=dtype,
            show_default=True,
            help=f"How {what} are stored; float16's error is stated beside them.",
        ),
        click.option(
            "--shard-size", type=click.IntRange(1, 2**24), default=shard_size, show_default=True
        ),
        click.option(
            "--batch-size", type=click.IntRange(1, 2**20), default=batch_size, show_default=True
        ),
        click.option(
            "--rank", help="k/n: encode every n-th shard [default: RANK/WORLD_SIZE, or 0/1]."
        ),
    )

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@data_group.command("encode")
@click.option("--task", help="Task, or task file: says what other options leave out.")
@click.option("--images", help="Folder of pictures or of tar shards, or a .tar or .npz file.")
@click.option(
    "--size", type=click.IntRange(1, 2**14), help="Height and width of the cropped images."
)
@click.option("--held-out", help="Held-out share of each class, or its files [default: 0.2].")
@click.option(
    "--autoencoder", help="Folder of an autoencoder of diffusers, or its name on the hub."
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder to write.")
@click.option("--flips", is_flag=True, help="Encode mirrored images too, as a second view.")
@click.option(
    "--posterior",
    type=click.Choice(["mean", "sample"]),
    default="mean",
    show_default=True,
    help="Store the mean of the posterior, or one sample of it.",
)
@click.option(
    "--seed",
    default=0,
    type=click.IntRange(0, 2**31),
    show_default=True,
    help="Seed of the sample.",
)
@storing("latents", "float32", shard_size=4096, batch_size=32)
@common(device=True)
def data_encode(
    task: str | None, rank: str | None, device: str, as_json: bool, **options: Any
) -> None:
    """Encode an image set to latents, which `data: {set: latents}` reads.

    The same command resumes after an interruption. Several ranks share a folder; the last one
    writes its manifest.
    """

    from harness.cli.console import Display, Plain
    from harness.runs.encoding import Asked, encode_images, rank_of
    from harness.tasks import load_task

    with suppress(TypeError, ValueError):
        options["held_out"] = float(options["held_out"])
    found_task, place = load_task(task) if task else None, rank_of(rank)
    with Display(Plain(stderr=True)) as display:
        found = encode_images(Asked(**options), found_task, chosen_device(device), *place, display)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    click.echo(found["folder"])
    for part in ("train", "held_out"):
        numbers = found[part]
        left = numbers["shards"] - numbers["shards_there"]
        rest = f", {left} left to other ranks" if left else ""
        click.echo(f"{part}: {numbers['images']} images, {numbers['shards_there']} shards{rest}")


@data_group.command("prompts")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--encoder", required=True, help="Folder of a diffusers pipeline, or its hub name.")
@click.option("--task", help="Task, or task file: says where the result lies.")
@click.option("--out", type=click.Path(path_type=Path), help="safetensors file to write.")
@click.option(
    "--tokens",
    type=click.IntRange(2, 512),
    help="Tokens that T5 reads [default: the pipeline's own number].",
)
@click.option(
    "--strict", is_flag=True, help="Refuse prompts that an encoder would cut, or does not know."
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="Precision of the encoders' weights; T5-XXL takes 19 GB in fp32.",
)
@storing("the outputs", "float16", shard_size=256, batch_size=8)
@common(device=True)
def data_prompts(
    file: Path, task: str | None, rank: str | None, device: str, as_json: bool, **options: Any
) -> None:
    """Encode the prompts of FILE, which a task's `prompts` reads.

    FILE has a prompt on each line. One that ends in .jsonl has a JSON mapping with `prompt` on each
    line; what else stands there is kept. The same command resumes after an interruption. Several
    ranks share the work; the last one writes the file.
    """

    from harness.cli.console import Display, Plain
    from harness.runs.encoding import rank_of
    from harness.runs.prompt_encoding import Asked, encode_file
    from harness.tasks import load_task

    found_task, place = load_task(task) if task else None, rank_of(rank)
    asked, where = Asked(file, **options), chosen_device(device)
    with Display(Plain(stderr=True)) as display:
        found = encode_file(asked, found_task, where, *place, display)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for note in found["notes"]:
        click.echo(note)
    left = found["shards"] - found["shards_there"]
    rest = f", {left} shards left to other ranks" if left else ""
    click.echo(f"{found['prompts']} prompts{rest}")
    if "sha256" in found:
        for name, shape in found["shapes"].items():
            click.echo(f"{name}: {shape}")
        click.echo(f"prompts: {{file: {found['file']}, sha256: {found['sha256']}}}")
