"""Options that commands share, and options made from typed configs. This file imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from harness.errors import UsageError
from harness.registry import registry_of
from harness.tracking import TRACKERS

if TYPE_CHECKING:
    import torch
    from pydantic import BaseModel

DEFAULT_TASK = "digits"


def field_options(
    model: type[BaseModel], names: Iterable[str], notes: Mapping[str, str] | None = None
) -> list[click.Parameter]:
    """A command-line option for each named field of a model; pydantic checks the values later.

    Args:
        notes: text to show after the default of a field, by its name.
    """
    options: list[click.Parameter] = []
    for name in names:
        field = model.model_fields[name]
        default = "none" if field.default in (None, ()) else field.default
        kinds = [
            part
            for part in (field.annotation, *get_args(field.annotation))
            if get_origin(part) is Literal
        ]
        words = ", ".join(str(word) for kind in kinds for word in get_args(kind))
        choices, note = f"one of: {words}; " if words else "", (notes or {}).get(name, "")
        help_text = f"{field.description} [{choices}default: {default}{note}]"
        options.append(
            click.Option([f"--{name.replace('_', '-')}", name], help=help_text, metavar="VALUE")
        )
    return options


save_samples_option = click.option(
    "--save-samples",
    type=click.Choice(["npz", "png", "geneval"]),
    help="Also write the samples for other evaluators: an .npz file, PNG by class, or PNG by "
    "prompt in GenEval's layout.",
)

track_option = click.option(
    "--track",
    type=click.Choice(list(TRACKERS)),
    help="Also tell a tracker what a run finds; each needs an extra of its name.",
)


def chosen(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a person gave."""
    return {name: value for name, value in options.items() if value is not None}


def values_after(args: list[str], flag: str) -> list[str]:
    """The values given to a flag, before click parses: `--flag VALUE` and `--flag=VALUE`."""
    pairs = zip(args, [*args[1:], None], strict=False)
    values = [
        after if word == flag else word.removeprefix(f"{flag}=")
        for word, after in pairs
        if word.partition("=")[0] == flag
    ]
    return [value for value in values if value is not None]


def value_after(args: list[str], flag: str) -> str | None:
    """The first of `values_after`, if there is one."""
    return next(iter(values_after(args, flag)), None)


def complete_methods(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The names of methods that begin with what was typed."""
    return [name for name in registry_of("method").names() if name.startswith(incomplete)]


class MethodCommand(click.Command):
    """A command with the options of the method that `--method` or the config file names."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # a shell completes a word: leave torch alone
            return super().parse_args(ctx, args)
        path = value_after(args, "--config")
        ctx.meta["file"] = file = read_config(path) if path else {}
        own, name = self.params, value_after(args, "--method") or file.get("method")
        if name is not None and not isinstance(name, str):
            names = ", ".join(registry_of("method").names())
            raise UsageError(
                f"config {path}: method is {name!r}, but it should be a name, one of: {names}"
            )
        if name:
            takes_task = any(option.name == "task" for option in own)
            task = (
                str(value_after(args, "--task") or file.get("task", DEFAULT_TASK))
                if takes_task
                else None
            )
            self.params = [*own, *method_options(name, task)]
        try:
            return super().parse_args(ctx, args)
        finally:
            self.params = own


def read_config(path: str) -> dict[str, Any]:
    """The content of a YAML file. Raises UsageError if it cannot be read."""
    from harness.documents import read_yaml

    return read_yaml(Path(path))


def method_options(method: str, task: str | None) -> list[click.Parameter]:
    """The options of a method; their help shows what the task sets.

    Raises UsageError for an unknown method.
    An unknown task sets nothing here; the command refuses it when it loads it.
    """
    config, notes = registry_of("method")[method].Config, {}
    if task is not None:
        tuned = task_defaults(task).get(method, {})
        notes = {name: f", on {task} {value}" for name, value in tuned.items()}
    return field_options(config, config.model_fields, notes)


def task_defaults(task: str) -> dict[str, dict[str, Any]]:
    """By method, the options that a task's file sets; nothing for an unknown task.

    It reads the file alone, since loading the task would import the data and the solvers.
    """
    from harness.documents import read_yaml

    shipped = Path(__file__).parents[1] / "tasks" / f"{task}.yaml"
    with suppress(UsageError):
        content = read_yaml(shipped if shipped.is_file() else Path(task))
        return content.get("defaults") or {}
    return {}


def common(*, results: bool = False, device: bool = False) -> Callable:
    """Options that many commands share."""

    def add(command: Callable) -> Callable:
        command = click.option(
            "--debug", is_flag=True, help="Show a traceback on errors.", expose_value=False
        )(command)
        command = click.option(
            "--plugin",
            multiple=True,
            expose_value=False,
            metavar="FILE",
            help="Python file that registers methods, solvers or metrics; "
            "its code runs with your rights.",
        )(command)
        command = click.option(
            "--json", "as_json", is_flag=True, help="Print one JSON document on stdout."
        )(command)
        if results:
            folder = click.Path(file_okay=False, path_type=Path)
            command = click.option(
                "--results",
                default=Path("results"),
                type=folder,
                show_default=True,
                help="Results folder.",
            )(command)
        return _with_device(command) if device else command

    return add


def _with_device(command: Callable) -> Callable:
    """The command with --device and --data-dir."""
    command = click.option(
        "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
    )(command)
    return click.option(
        "--data-dir",
        expose_value=False,
        callback=_set_data_folder,
        metavar="DIR",
        help="Folder of data sets, where missing ones are downloaded to "
        "[default: HARNESS_DATA, or data in the cache folder].",
    )(command)


def _set_data_folder(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Sets HARNESS_DATA, for this process and its children. Raises UsageError without a folder."""
    if value is not None:
        if not Path(value).is_dir():
            raise UsageError(
                f"--data-dir is {value}, but there is no such folder: give the one with the data "
                "sets, or make an empty one for downloads"
            )
        os.environ["HARNESS_DATA"] = str(Path(value).resolve())


def chosen_device(name: str) -> torch.device:
    """The device of that name; auto is CUDA if there is any. Each rank has a GPU of its own.

    Raises UsageError for a device that cannot be used.
    """
    import torch

    from harness import ranks

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and ranks.started():
            device = torch.device("cuda", ranks.local_number())
        if device.type not in ("cpu", "cuda"):
            raise NotImplementedError(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"device {name!r} is not available here; give cpu, or cuda on a machine with a GPU"
        ) from error
    return device


def say(text: str) -> None:
    """Prints a line on stderr."""
    click.echo(text, err=True)
