"""The command line: parse, call, print. Floor 9."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click
import torch
import yaml
from pydantic import BaseModel
from rich.console import Console

from harness import __version__
from harness.config import RunConfig, parse_config, parse_options
from harness.console import Display
from harness.cost import paper_problem, sampling_cost_on_meta
from harness.errors import HarnessError, RunFailed, UsageError
from harness.evaluator import DIRECTIONS
from harness.methods import METHODS
from harness.records import PACKAGES, capture_environment, package_version
from harness.report.console import print_results
from harness.report.markdown import page, publish
from harness.report.tables import load_records, results_table, rows_of
from harness.run import run
from harness.solvers import SOLVERS
from harness.sweep import expand, plan, run_sweep
from harness.tasks import load_task, task_names
from harness.teacher import train_networks, verify

RUN_FIELDS = [name for name in RunConfig.model_fields if name not in ("method", "options")]


def field_options(model: type[BaseModel], names: list[str]) -> list[click.Parameter]:
    """A command-line option for each field; values stay text, pydantic judges them."""
    options: list[click.Parameter] = []
    for name in names:
        field = model.model_fields[name]
        default = "the task's" if field.default is None else field.default
        help_text = f"{field.description} [default: {default}]"
        options.append(click.Option([f"--{name.replace('_', '-')}", name], help=help_text, metavar="VALUE"))
    return options


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises UsageError if it does not."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"config {path} must hold a mapping from names to values")
    return content


def value_after(args: list[str], flag: str) -> str | None:
    """The value given to a flag, before click parses."""
    for position, word in enumerate(args):
        if word == flag and position + 1 < len(args):
            return args[position + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


class MethodCommand(click.Command):
    """A command whose options are its own, plus those of the method that is asked for."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        path, name = value_after(args, "--config"), value_after(args, "--method")
        ctx.meta["file"] = read_yaml(path) if path else {}
        name = name or ctx.meta["file"].get("method")
        if name is not None and not isinstance(name, str):
            raise UsageError(f"config {path}: method is {name!r}, but it should be a name, one of: {', '.join(METHODS.names())}")
        ctx.meta["method_options"] = list(METHODS[name].Config.model_fields) if name else []
        extra = field_options(METHODS[name].Config, ctx.meta["method_options"]) if name else []
        own = self.params
        self.params = [*own, *extra]
        try:
            return super().parse_args(ctx, args)
        finally:
            self.params = own


class Group(click.Group):
    """Turns errors into one sentence and their exit code."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        try:
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
        command = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(command)
        if results:
            folder = click.Path(file_okay=False, path_type=Path)
            command = click.option("--results", default=Path("results"), type=folder, show_default=True, help="Results folder.")(command)
        if device:
            command = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")(command)
        return command

    return add


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


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
def main() -> None:
    """Benchmark and ablate few-step distillation of diffusion transformers."""


@main.command("run", cls=MethodCommand)
@click.option("--method", help="Name of the method; `harness list methods` lists them.", metavar="NAME")
@click.option("--config", help="YAML file with the fields of a run; options given here count more.", metavar="FILE")
@click.option(
    "--set", "assignments", multiple=True, help="KEY=VALUE for a field of the run or an option of the method.", metavar="KEY=VALUE"
)
@click.option("--reuse", is_flag=True, help="Take a finished record that other code made.")
@common(results=True, device=True)
@click.pass_context
def run_command(ctx: click.Context, method: str | None, config: str | None, assignments: tuple[str, ...], reuse: bool, as_json: bool,
                results: Path, device: str, **given: str | None) -> None:  # fmt: skip
    """Run one method on a task and print its row beside the reference's."""
    values = dict(ctx.meta["file"])
    options = values.pop("options", None) or {}
    if not isinstance(options, dict):
        raise UsageError(f"config {config}: options is {options!r}, but it should be a mapping from names to values")
    options = dict(options)
    pairs = {name: value for name, value in given.items() if value is not None}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment} has no '='; give KEY=VALUE")
        pairs[key.replace("-", "_")] = value
    for key, value in pairs.items():
        (values if key in RUN_FIELDS else options)[key] = value
    if method:
        values["method"] = method
    if "method" not in values:
        raise UsageError(f"no method is named; give --method, one of: {', '.join(METHODS.names())}")
    console = Console(stderr=True)
    with Display(console) as display:
        record, reference = run(parse_config({**values, "options": options}), results, chosen_device(device), display, reuse)
    if as_json:
        click.echo(record.model_dump_json(indent=1))
        return
    shown = [reference, record] if reference.run_id != record.run_id else [record]
    print_results(shown, Console())
    click.echo(f"record: {results / 'runs' / record.run_id / 'record.json'}; samples: samples.png beside it")


for _option in field_options(RunConfig, RUN_FIELDS):
    run_command.params.append(_option)


@main.command("sweep")
@click.argument("file", metavar="FILE")
@click.option("--dry-run", is_flag=True, help="Only show what would run and what is already there.")
@click.option("--reuse", is_flag=True, help="Take finished records that other code made, published ones too.")
@common(results=True, device=True)
def sweep_command(file: str, dry_run: bool, reuse: bool, as_json: bool, results: Path, device: str) -> None:
    """Run all that a sweep file asks for; finished runs are skipped and interrupted ones resumed.

    The same command in a second terminal shares the work.
    """
    where = chosen_device(device)
    cells = plan(expand(read_yaml(file), f"sweep file {file}"), results, where, reuse)
    missing = sum(cell.record is None for cell in cells)
    if dry_run:
        lines = [{"run_id": c.resolved.run_id, "seed": c.resolved.settings.seed, "steps": c.resolved.settings.total_steps,
                  "state": "finished" if c.record else "to run", **c.config.model_dump(exclude_unset=True)} for c in cells]  # fmt: skip
        if as_json:
            click.echo(json.dumps(lines, indent=1))
            return
        for line in lines:
            click.echo(f"{line['state']:9} {line['run_id']:40} seed {line['seed']} {json.dumps(line.get('options', {}))}")
        click.echo(f"{missing} of {len(cells)} runs to make")
        return
    console = Console(stderr=True)
    with Display(console) as display:
        said = lambda text: console.print(text, highlight=False)  # noqa: E731
        records = run_sweep(cells, results, where, display, reuse, said)
    if as_json:
        click.echo(json.dumps([json.loads(record.model_dump_json()) for record in records], indent=1))
        return
    failed = [record for record in records if record.status == "failed"]
    click.echo(f"{len(records) - len(failed)} of {len(cells)} runs finished, {len(failed)} failed, the rest is another process's; "
               f"`harness report {results}` shows them")  # fmt: skip
    if failed:
        raise RunFailed(f"{len(failed)} of {len(cells)} runs failed: {', '.join(record.run_id for record in failed)}")


@main.command("report")
@click.argument("results", default="results", type=click.Path(file_okay=False, path_type=Path))
@click.option("--format", "form", default="markdown", type=click.Choice(["markdown", "csv"]), show_default=True)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write instead of stdout.")
@click.option("--publish", "to_publish", is_flag=True, help="Copy records and grids to RESULTS/<task>/ and write its README.md.")
@common()
def report_command(results: Path, form: str, output: Path | None, to_publish: bool, as_json: bool) -> None:
    """Print the tables of all records below RESULTS."""
    records = load_records(results)
    if to_publish:
        for written in publish(records, results):
            click.echo(f"wrote {written}", err=True)
        return
    if as_json:
        text = json.dumps([json.loads(record.model_dump_json()) for record in records], indent=1)
    else:
        text = page(records) if form == "markdown" else results_table(rows_of(records)).to_csv(index=False)
    if output:
        from harness.files import write_text

        write_text(output, text)
    else:
        click.echo(text)


@main.command("list")
@click.argument("kind", type=click.Choice(["methods", "tasks", "solvers", "metrics"]))
@common()
def list_command(kind: str, as_json: bool) -> None:
    """List what is registered."""
    if kind == "tasks":
        found = {name: load_task(name).spec.summary for name in task_names()}
    elif kind == "methods":
        found = {name: summary(METHODS[name]) for name in METHODS.names()}
    elif kind == "metrics":
        found = {
            name: f"{direction} is better" if direction != "none" else "neither way is better" for name, direction in DIRECTIONS.items()
        }
    else:
        found = {name: summary(SOLVERS[name]) for name in SOLVERS.names()}
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for name, text in found.items():
        click.echo(f"{name:24} {text}")


def summary(cls: type) -> str:
    """First line of a class's docstring."""
    return (cls.__doc__ or "").strip().partition("\n")[0]


@main.command("describe")
@click.argument("method")
@common()
def describe_command(method: str, as_json: bool) -> None:
    """Say what a method is: its paper, equations, needs and options."""
    cls = METHODS[method]
    fields = {
        name: {"default": field.default, "type": str(field.annotation).replace("typing.", ""), "doc": field.description}
        for name, field in cls.Config.model_fields.items()
    }
    doc = (sys.modules[cls.__module__].__doc__ or "").strip()
    if as_json:
        needs = sorted(cls.sources)
        click.echo(json.dumps({"name": method, "doc": doc, "reference": cls.reference, "sources": needs, "options": fields}, indent=1))
        return
    click.echo(f"{method}: {summary(cls)}\n\n{doc}\n\nsource: {cls.reference}")
    click.echo(f"needs: {', '.join(sorted(cls.sources)) or 'no training'}; target: {cls.target}\n\noptions:")
    for name, field in fields.items():
        kind = field["type"] if "Literal" in str(field["type"]) else str(field["type"]).removeprefix("<class '").removesuffix("'>")
        click.echo(f"  --{name.replace('_', '-'):18} {field['doc']} [{kind}, default {field['default']}]")


@main.command("cost", cls=MethodCommand)
@click.option("--method", required=True, help="Name of the method.", metavar="NAME")
@click.option("--network", default="DiT-XL/2", show_default=True, help="Size and patch, as in the DiT paper.")
@click.option("--image-size", default=256, show_default=True, type=click.IntRange(1, 2**14), help="Side of the image in pixels.")
@click.option("--latent/--pixels", default=True, show_default=True, help="On latents 8 times smaller with 4 channels, or on 3 colours.")
@click.option("--num-classes", default=1000, show_default=True, type=click.IntRange(1, 2**24))
@click.option("--num-steps", default=4, show_default=True, type=click.IntRange(1, 1000))
@common()
def cost_command(method: str, network: str, image_size: int, latent: bool, num_classes: int, num_steps: int, as_json: bool,
                 **options: str | None) -> None:  # fmt: skip
    """Count what a method's sampler costs on a network of the paper's sizes, without weights."""
    config = parse_options(method, {name: value for name, value in options.items() if value is not None})
    problem = paper_problem(network, image_size, latent, num_classes, num_steps)
    found = sampling_cost_on_meta(method, config, problem, num_steps)
    if as_json:
        click.echo(json.dumps({**vars(found), "extra": found.extra}, indent=1))
        return
    click.echo(f"{method} on {network} at {image_size} px{' (latent)' if latent else ''}, {num_steps} steps, one sample, no guidance")
    for kind, macs in found.by_kind.items():
        click.echo(f"  {kind:24} {macs / 1e9:10.3f} GMACs")
    click.echo(f"  {'total':24} {found.macs / 1e9:10.3f} GMACs in {found.nfe:g} passes, {found.parameters / 1e6:.2f} M parameters")
    added = (found.macs - found.plain_macs) / 1e9
    click.echo(f"  plain passes {found.plain_macs / 1e9:.3f} GMACs; added {added:.3f} GMACs ({found.extra:+.2%})")


@main.command("env")
@common(device=True)
def env_command(as_json: bool, device: str) -> None:
    """Show versions, device and code, as records keep them."""
    environment = capture_environment(chosen_device(device)).model_dump()
    environment["harness"] = __version__
    environment["packages"] |= {name: package_version(name) or "missing" for name in PACKAGES}
    if as_json:
        click.echo(json.dumps(environment, indent=1))
        return
    for name, value in environment.items():
        click.echo(f"{name:12} {value}")


@main.group("teacher")
def teacher_group() -> None:
    """Train or verify the networks that ship with a task."""


@teacher_group.command("train")
@click.option("--task", default="digits", show_default=True)
@common(results=True, device=True)
def teacher_train(task: str, results: Path, device: str, as_json: bool) -> None:
    """Train a task's feature network and teacher, and scan guidance; resumes where it was interrupted."""
    with Display(Console(stderr=True)) as display:
        made = train_networks(load_task(task), results / "teachers" / task, chosen_device(device), display)
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
