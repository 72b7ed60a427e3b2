"""What there is and what it would cost: `harness list`, `describe`, `cost`, `env`. Floor 11."""

from __future__ import annotations

import inspect
import json
import sys
from typing import Any, get_origin

import click
import yaml

from harness import __version__
from harness.cli.options import MethodCommand, chosen_device, common
from harness.errors import unknown
from harness.methods import METHODS
from harness.metrics import METRICS
from harness.provenance import PACKAGES, capture_environment, package_version
from harness.runs.config import parse_options
from harness.runs.cost import paper_problem, sampling_cost_on_meta
from harness.solvers import SOLVERS
from harness.tasks import load_task, task_names


@click.command("list")
@click.argument("kind", type=click.Choice(["methods", "tasks", "solvers", "metrics"]))
@common()
def list_command(kind: str, as_json: bool) -> None:
    """List what is registered."""
    if kind == "tasks":
        found = {name: load_task(name).spec.summary for name in task_names()}
    elif kind == "methods":
        found = {name: summary(METHODS[name]) for name in METHODS.names()}
    elif kind == "metrics":
        found = {name: METRICS[name].summary for name in METRICS.names()}
    else:
        found = {name: summary(SOLVERS[name]) for name in SOLVERS.names()}
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for name, text in found.items():
        click.echo(f"{name:24} {text}")


def summary(cls: type) -> str:
    """First sentence of a class's docstring."""
    return " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split()).partition(": `")[0]


@click.command("describe")
@click.argument("name")
@common()
def describe_command(name: str, as_json: bool) -> None:
    """Say what a method is (its paper, equations, needs and options), or a task, a solver or a metric."""
    if name in METHODS.names():
        describe_method(name, as_json)
        return
    facts: dict[str, Any] = {}
    if name in task_names():
        facts = load_task(name).spec.model_dump(mode="json")
        doc = facts.pop("summary")
    elif name in SOLVERS.names():
        doc = inspect.getdoc(SOLVERS[name]) or ""
    elif name in METRICS.names():
        doc = inspect.getdoc(METRICS[name].function) or ""
        facts = {"direction": METRICS[name].direction, "needs": list(METRICS[name].needs)}
    else:
        raise unknown("name", name, [*METHODS.names(), *task_names(), *SOLVERS.names(), *METRICS.names()])
    if as_json:
        click.echo(json.dumps({"name": name, "doc": doc, **facts}, indent=1))
        return
    click.echo(f"{name}: {doc}" + (f"\n\n{yaml.safe_dump(facts, sort_keys=False)}" if facts else ""))


def kind_of(annotation: Any) -> str:
    """An option's type in words."""
    if get_origin(annotation) is tuple:
        return "whole numbers"
    return str(annotation).replace("typing.", "").removeprefix("<class '").removesuffix("'>")


def describe_method(method: str, as_json: bool) -> None:
    """Prints a method's paper, equations, needs and options."""
    cls = METHODS[method]
    fields = {
        name: {"default": field.default, "type": kind_of(field.annotation), "doc": field.description}
        for name, field in cls.Config.model_fields.items()
    }
    doc = (sys.modules[cls.__module__].__doc__ or "").strip()
    if as_json:
        needs = sorted(cls.sources)
        click.echo(json.dumps({"name": method, "doc": doc, "reference": cls.reference, "sources": needs, "options": fields}, indent=1))
        return
    click.echo(f"{method}: {summary(cls)}\n\n{doc}\n\nsource: {cls.reference}")
    needs = [*sorted(cls.sources), *(["class labels"] if cls.needs_labels else [])]
    steps = "; one student serves any number of steps" if cls.any_step else ""
    click.echo(f"needs: {', '.join(needs) or 'no training'}; target by default: {cls.target}{steps}\n\noptions:")
    for name, field in fields.items():
        default = "none" if field["default"] == () else field["default"]
        click.echo(f"  --{name.replace('_', '-'):18} {field['doc']} [{field['type']}, default {default}]")


@click.command("cost", cls=MethodCommand)
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


@click.command("env")
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
