"""How the command line is built: options made of typed configs, errors in one sentence, files of YAML. Floor 10."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import click
import torch
from pydantic import BaseModel

from harness.errors import HarnessError, UsageError
from harness.files import read_yaml
from harness.methods import METHODS
from harness.plugins import load_plugin
from harness.runs.config import RunConfig
from harness.tasks import load_task

RUN_FIELDS = [name for name in RunConfig.model_fields if name not in ("method", "options")]


def field_options(model: type[BaseModel], names: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> list[click.Parameter]:
    """A command-line option for each field; values stay text, pydantic judges them.

    Args:
        elsewhere: what is to be said of a field beside its default, by its name.
    """
    options: list[click.Parameter] = []
    beside = elsewhere or {}
    for name in names:
        field = model.model_fields[name]
        default = "none" if field.default in (None, ()) else field.default
        kinds = [part for part in (field.annotation, *get_args(field.annotation)) if get_origin(part) is Literal]
        words = ", ".join(str(word) for kind in kinds for word in get_args(kind))
        help_text = f"{field.description} [{f'one of: {words}; ' if words else ''}default: {default}{beside.get(name, '')}]"
        options.append(click.Option([f"--{name.replace('_', '-')}", name], help=help_text, metavar="VALUE"))
    return options


def values_after(args: list[str], flag: str) -> list[str]:
    """The values given to a flag, before click parses."""
    found = []
    for position, word in enumerate(args):
        if word == flag and position + 1 < len(args):
            found.append(args[position + 1])
        elif word.startswith(f"{flag}="):
            found.append(word.partition("=")[2])
    return found


def value_after(args: list[str], flag: str) -> str | None:
    """The first of `values_after`, if any."""
    return next(iter(values_after(args, flag)), None)


class MethodCommand(click.Command):
    """A command whose options are its own, plus those of the method that is asked for."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        path, name = value_after(args, "--config"), value_after(args, "--method")
        ctx.meta["file"] = read_yaml(Path(path)) if path else {}
        name = name or ctx.meta["file"].get("method")
        if name is not None and not isinstance(name, str):
            raise UsageError(f"config {path}: method is {name!r}, but it should be a name, one of: {', '.join(METHODS.names())}")
        own, extra = self.params, []
        if name:
            has_task = any(option.name == "task" for option in own)
            task = value_after(args, "--task") or ctx.meta["file"].get("task", RunConfig.model_fields["task"].default)
            config = METHODS[name].Config
            extra = field_options(config, config.model_fields, _defaults_on(str(task), name) if has_task else {})
        self.params = [*own, *extra]
        try:
            return super().parse_args(ctx, args)
        finally:
            self.params = own


def _defaults_on(task: str, method: str) -> dict[str, str]:
    """What is to be said of options that a task has in the place of their defaults; a task that is not there is told when it is needed."""
    with suppress(UsageError):
        return {name: f", on {task} {value}" for name, value in load_task(task).spec.defaults.get(method, {}).items()}
    return {}


class Group(click.Group):
    """Turns errors into one sentence and their exit code."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        words = list(kwargs.get("args") or (args[0] if args else None) or sys.argv[1:])
        try:
            for path in values_after(words, "--plugin"):  # before parsing: options are made of what is registered
                load_plugin(Path(path))
            super().main(*args, **{**kwargs, "standalone_mode": False})
            sys.exit(0)
        except HarnessError as error:
            if "--debug" in sys.argv:
                raise
            click.echo(f"harness: {error}", err=True)
            sys.exit(error.exit_code)
        except click.exceptions.Exit as error:
            sys.exit(error.exit_code)
        except click.ClickException as error:
            error.show()
            sys.exit(2)
        except (click.Abort, KeyboardInterrupt):
            click.echo("harness: interrupted; the same command resumes a run", err=True)
            sys.exit(130)


def common(*, results: bool = False, device: bool = False) -> Callable:
    """Options that many commands share."""

    def add(command: Callable) -> Callable:
        command = click.option("--debug", is_flag=True, help="Show a traceback on errors.", expose_value=False)(command)
        command = click.option("--plugin", multiple=True, expose_value=False, metavar="FILE", help="Python file that registers more.")(
            command
        )
        command = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(command)
        if results:
            folder = click.Path(file_okay=False, path_type=Path)
            command = click.option("--results", default=Path("results"), type=folder, show_default=True, help="Results folder.")(command)
        if device:
            command = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")(command)
            command = click.option("--data-dir", expose_value=False, callback=_set_data_folder, metavar="DIR",
                                   help="Where data sets are, or are downloaded to [default: HARNESS_DATA, or data in the cache folder].",
                                   )(command)  # fmt: skip
        return command

    return add


def _set_data_folder(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """For this process, its workers and its jobs."""
    if value is not None:
        os.environ["HARNESS_DATA"] = str(Path(value).resolve())


def chosen_device(name: str) -> torch.device:
    """The device of that name; auto is CUDA where there is one. Raises UsageError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise NotImplementedError(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {name!r} is not to be had here; give cpu, or cuda where there is one") from error
    return device
