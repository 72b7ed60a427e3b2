"""The command line: finds the commands, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from harness import __version__
from harness.cli.options import values_after
from harness.errors import HarnessError, RankLost, UsageError, printable, sentence
from harness.registry import declared

COMMANDS = declared("cli", "click.command", "click.group")


class LazyGroup(click.Group):
    """A group of stand-ins with name and summary; a command is imported when it is used."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, stand_in, rest = super().resolve_command(ctx, args)
        return name, COMMANDS[name].load() if name and stand_in else None, rest

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Runs a command and exits: 0, or the exit code of its error."""
        words = list(kwargs.get("args") or (args[0] if args else None) or sys.argv[1:])
        try:
            check_ranks(words)
            load_plugins(words)
            super().main(*args, **{**kwargs, "standalone_mode": False})
            sys.exit(0)
        except HarnessError as error:
            if "--debug" in words:
                raise
            if not error.told:
                rank = os.environ.get("RANK", "0")
                where = "" if rank == "0" or isinstance(error, RankLost) else f"rank {rank}: "
                click.echo(f"harness: {where}{sentence(str(error))}", err=True)
            if isinstance(error, RankLost):
                os._exit(error.exit_code)  # an orderly end would wait for the other rank
            sys.exit(error.exit_code)
        except click.exceptions.Exit as error:
            sys.exit(error.exit_code)
        except click.ClickException as error:
            shown = io.StringIO()
            error.show(shown)
            click.echo("\n".join(map(printable, shown.getvalue().split("\n"))), err=True, nl=False)
            sys.exit(2)
        except OSError as error:  # a name that is too long, a folder that may not be read
            if "--debug" in words:
                raise
            where = "" if error.filename is None else f"{error.filename}: "
            click.echo(f"harness: {sentence(f'{where}{error.strerror or error}')}", err=True)
            sys.exit(2)
        except (click.Abort, KeyboardInterrupt):
            click.echo("harness: interrupted; the same command resumes a run", err=True)
            sys.exit(130)


def check_ranks(words: list[str]) -> None:
    """Raises UsageError if torchrun starts a command that is not made for several ranks."""
    command = next((word for word in words if not word.startswith("-")), "run")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and command not in ("run", "data"):
        raise UsageError(f"{command} is for one process: start it without torchrun")


def load_plugins(words: list[str]) -> None:
    """Loads the files given by `--plugin`, before click parses options that depend on them."""
    paths = values_after(words, "--plugin")
    if paths:
        from harness.plugins import load_plugin

        for path in paths:
            load_plugin(Path(path))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.version_option(__version__)
def main() -> None:
    """Benchmark and ablate few-step distillation of diffusion transformers."""


for _name, _command in COMMANDS.items():
    main.add_command(click.Command(_name, help=_command.summary, hidden=_name.startswith("_")))
