"""`harness student export`, `ema` and `push`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from harness.cli.options import common


@click.group("student")
def student_group() -> None:
    """Give a trained student to others: a file or folder with a model card, or on the hub."""


@student_group.command("export")
@click.argument("run", metavar="RUN")
@click.option(
    "--format",
    "kind",
    default="safetensors",
    show_default=True,
    type=click.Choice(["safetensors", "diffusers", "lora"]),
    help="One file with its options in the metadata, a folder that diffusers samples, or the "
    "adapters of a student with --lora-rank.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write [default: students/RUN-FORMAT in the results folder].",
)
@click.option("--task", help="File of the run's task, if it does not ship.", metavar="FILE")
@common(results=True)
def student_export(
    run: str, kind: str, out: Path | None, task: str | None, results: Path, as_json: bool
) -> None:
    """Write the student of a finished run, RUN, a run id or its folder, with a model card."""
    from harness.runs.export import export

    folder = export(run, kind, results, out, task)
    files = [str(path) for path in sorted(folder.rglob("*")) if path.is_file()]
    click.echo(json.dumps(files, indent=1) if as_json else "\n".join(files))


@student_group.command("ema")
@click.argument("run", metavar="RUN")
@click.option(
    "--width",
    type=float,
    required=True,
    help="Standard deviation of the averaged steps, as a part of the run: 0.01 to 0.25.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write [default: student-ema-WIDTH.safetensors in the run's folder].",
)
@common(results=True)
def student_ema(run: str, width: float, out: Path | None, results: Path, as_json: bool) -> None:
    """Write the student of RUN under another average of its weights.

    The run was made with --snapshots. `harness evaluate --student FILE` judges the file.
    """
    from harness.runs.averages import write_average

    path = write_average(run, width, results, out)
    click.echo(json.dumps({"file": str(path)}) if as_json else str(path))


@student_group.command("push")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@common()
def student_push(folder: Path, repository: str, private: bool, as_json: bool) -> None:
    """Upload FOLDER, which `harness student export` wrote, to OWNER/NAME on the hub."""
    from harness.runs.hub import push

    address = push(folder, repository, private)
    click.echo(json.dumps({"address": address}) if as_json else address)
