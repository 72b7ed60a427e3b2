"""`harness list`, `describe`, `cost` and `env`: what exists, and what it would cost."""

from __future__ import annotations

import inspect
import json
import sys
from importlib.resources import files
from typing import TYPE_CHECKING, Any, get_args, get_origin

import click

from harness import __version__
from harness.cli.options import MethodCommand, chosen, chosen_device, common, complete_methods
from harness.errors import UsageError, unknown
from harness.registry import first_line, registry_of

if TYPE_CHECKING:
    from harness.methods import MethodConfig
    from harness.runs.cost import PaperProblem


@click.command("list")
@click.argument("kind", type=click.Choice(["methods", "tasks", "solvers", "metrics"]))
@common()
def list_command(kind: str, as_json: bool) -> None:
    """List methods, tasks, solvers or metrics, with a line on each."""
    found = task_summaries() if kind == "tasks" else registry_of(kind.removesuffix("s")).summaries()
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for name, text in found.items():
        click.echo(f"{name:24} {text}")


def task_summaries() -> dict[str, str]:
    """The summary of each task in the package, read from its file alone."""
    import yaml

    paths = {
        path.name.removesuffix(".yaml"): path
        for path in (files("harness") / "tasks").iterdir()
        if path.name.endswith(".yaml")
    }
    return {
        name: yaml.safe_load(paths[name].read_text(encoding="utf-8"))["summary"]
        for name in sorted(paths)
    }


@click.command("describe")
@click.argument("name")
@common()
def describe_command(name: str, as_json: bool) -> None:
    """Describe a method (paper, equations, sources, options), a task, a solver, a metric or a
    network.

    A network is named as in the DiT paper, such as DiT-XL/2, and counted on 256 px.
    """
    if name in registry_of("method").names():
        describe_method(name, as_json)
        return
    doc, facts = description(name)
    if as_json:
        click.echo(json.dumps({"name": name, "doc": doc, **facts}, indent=1))
        return
    import yaml

    click.echo(
        f"{name}: {doc}" + (f"\n\n{yaml.safe_dump(facts, sort_keys=False)}" if facts else "")
    )


def description(name: str) -> tuple[str, dict[str, Any]]:
    """Text and facts on a task, a solver, a metric or a network.

    Raises UsageError for an unknown name.
    """
    if name.startswith("DiT-"):
        return network_facts(name)
    from harness.metrics import METRICS
    from harness.solvers import SOLVERS
    from harness.tasks import load_task, task_names

    if name in task_names():
        facts = load_task(name).spec.model_dump(mode="json")
        return facts.pop("summary"), facts
    if name in SOLVERS.names():
        return inspect.getdoc(SOLVERS[name]) or "", {}
    if name in METRICS.names():
        metric = METRICS[name]
        return inspect.getdoc(metric.function) or "", {
            "direction": metric.direction,
            "needs": list(metric.needs),
        }
    raise unknown(
        "name",
        name,
        [*registry_of("method").names(), *task_names(), *SOLVERS.names(), *METRICS.names()],
    )


def network_facts(name: str) -> tuple[str, dict[str, Any]]:
    """Sizes, parameters and GMACs of a pass of a network of the DiT paper on 256 px latents."""
    from harness.runs.config import parse_options
    from harness.runs.cost import paper_problem, sampling_cost_on_meta

    problem = paper_problem(name, 256, True, 1000, 1)
    cost = sampling_cost_on_meta("teacher", parse_options("teacher", {}), problem, 1)
    options = problem.network_options
    facts = {
        **options,
        "tokens": (options["image_size"] // options["patch_size"]) ** 2,
        "parameters": cost.parameters,
        "gmacs_per_pass": round(cost.macs / 1e9, 2),
    }
    doc = (
        "a transformer of the DiT paper (arXiv 2212.09748, table 1) on latents of 256 px, "
        f"{cost.parameters / 1e6:.1f} M parameters; `harness cost` counts other images"
    )
    return doc, facts


def kind_of(annotation: Any) -> str:
    """An option's type in words."""
    if get_origin(annotation) is tuple:
        return "words" if str in get_args(get_args(annotation)[0]) else "whole numbers"
    return str(annotation).replace("typing.", "").removeprefix("<class '").removesuffix("'>")


def describe_method(method: str, as_json: bool) -> None:
    """Prints the paper, equations, sources and options of a method."""
    cls = registry_of("method")[method]
    fields = {
        name: {
            "default": field.default,
            "type": kind_of(field.annotation),
            "doc": field.description,
        }
        for name, field in cls.Config.model_fields.items()
    }
    doc = (sys.modules[cls.__module__].__doc__ or "").strip()
    if as_json:
        needs = sorted(cls.sources)
        click.echo(
            json.dumps(
                {
                    "name": method,
                    "doc": doc,
                    "reference": cls.reference,
                    "sources": needs,
                    "options": fields,
                },
                indent=1,
            )
        )
        return
    click.echo(f"{method}: {first_line(inspect.getdoc(cls))}\n\n{doc}\n\nsource: {cls.reference}")
    needs = [*sorted(cls.sources), *(["class labels"] if cls.needs_labels else [])]
    steps = "; one student serves any number of steps" if cls.any_step else ""
    click.echo(
        f"needs: {', '.join(needs) or 'no training'}; "
        f"target by default: {cls.target}{steps}\n\noptions:"
    )
    for name, field in fields.items():
        default = "none" if field["default"] == () else field["default"]
        click.echo(
            f"  --{name.replace('_', '-'):18} {field['doc']} [{field['type']}, default {default}]"
        )


@click.command("cost", cls=MethodCommand)
@click.option(
    "--method",
    required=True,
    help="Name of a method.",
    metavar="NAME",
    shell_complete=complete_methods,
)
@click.option(
    "--task",
    "of_task",  # not `task`: without one, the options of a method have no task's defaults
    help="Task, or task file: takes the place of the options from --network to --num-classes.",
    metavar="NAME",
)
@click.option(
    "--network",
    default="DiT-XL/2",
    show_default=True,
    help="Size and patch in the terms of the DiT paper.",
)
@click.option(
    "--image-size",
    default=256,
    show_default=True,
    type=click.IntRange(1, 2**14),
    help="Side of the image in pixels.",
)
@click.option(
    "--latent/--pixels",
    default=True,
    show_default=True,
    help="Latents (8 times smaller, 4 channels) or pixels (3 channels).",
)
@click.option("--num-classes", default=1000, show_default=True, type=click.IntRange(1, 2**24))
@click.option("--num-steps", default=4, show_default=True, type=click.IntRange(1, 1000))
@common()
@click.pass_context
def cost_command(
    ctx: click.Context,
    method: str,
    of_task: str | None,
    network: str,
    image_size: int,
    latent: bool,
    num_classes: int,
    num_steps: int,
    as_json: bool,
    **options: str | None,
) -> None:
    """Count the cost of sampling with a method, without weights or files.

    The network is one of the DiT paper, or that of a task.
    """
    from harness.runs.config import parse_options
    from harness.runs.cost import paper_problem, sampling_cost_on_meta

    given = chosen(options)
    if of_task is None:
        config = parse_options(method, given)
        problem = paper_problem(network, image_size, latent, num_classes, num_steps)
        name = f"{network} at {image_size} px{' (latent)' if latent else ''}"
    else:
        config, problem = of_task_file(ctx, of_task, method, given)
        name = of_task
    found = sampling_cost_on_meta(method, config, problem, num_steps)
    if as_json:
        click.echo(json.dumps({**vars(found), "extra": found.extra}, indent=1))
        return
    click.echo(f"{method} on {name}, {num_steps} steps, one sample, no guidance")
    for kind, macs in found.by_kind.items():
        if macs:
            click.echo(f"  {kind:24} {macs / 1e9:10.3f} GMACs")
    click.echo(
        f"  {'total':24} {found.macs / 1e9:10.3f} GMACs in {found.nfe:g} passes, "
        f"{found.parameters / 1e6:.2f} M parameters"
    )
    if found.merged_macs != found.macs:
        click.echo(
            f"  adapters: {found.trained_parameters / 1e6:.2f} M parameters train; merged "
            f"{found.merged_macs / 1e9:.3f} GMACs"
        )
    added = (found.macs - found.plain_macs) / 1e9
    click.echo(
        f"  plain passes {found.plain_macs / 1e9:.3f} GMACs; "
        f"added {added:.3f} GMACs ({found.extra:+.2%})"
    )
    if found.cache:
        click.echo(f"  keys and values of earlier states {found.cache / 1e6:.1f} MB in float32")


def of_task_file(
    ctx: click.Context, name: str, method: str, given: dict[str, Any]
) -> tuple[MethodConfig, PaperProblem]:
    """A method's options on a task, and the task without its data and weights.

    Raises UsageError if a network is named beside the task, or for a task with an exact teacher.
    """
    from harness.runs.config import RunConfig
    from harness.runs.plan import problem_of
    from harness.runs.resolve import options_on
    from harness.tasks import load_task

    for option in ("network", "image_size", "latent", "num_classes"):
        if ctx.get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE:
            raise UsageError(
                f"--task {name} says its network: leave --{option.replace('_', '-')} out"
            )
    task = load_task(name)
    if not task.network_teacher:
        raise UsageError(f"the teacher of task {name} is exact: there is no network to count")
    return options_on(task, RunConfig(method=method, options=given, task=name)), problem_of(task)


@click.command("env")
@common(device=True)
def env_command(as_json: bool, device: str) -> None:
    """Show versions, device and code in the form that records keep."""
    from harness.provenance import PACKAGES, capture_environment, package_version

    environment = capture_environment(chosen_device(device)).model_dump()
    environment["harness"] = __version__
    environment["packages"] |= {name: package_version(name) or "missing" for name in PACKAGES}
    if as_json:
        click.echo(json.dumps(environment, indent=1))
        return
    for name, value in environment.items():
        click.echo(f"{name:12} {value}")
