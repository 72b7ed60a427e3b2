"""The command line: parse, call, print. Floor 9."""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, get_origin

import click
import torch
import yaml
from rich.console import Console

from harness import __version__
from harness.config import RunConfig, parse_config, parse_options, resolve
from harness.console import Display
from harness.contract import Outcome, run_checks
from harness.cost import paper_problem, sampling_cost_on_meta
from harness.errors import CheckFailed, RunFailed, UsageError, unknown
from harness.evaluator import directions
from harness.external import Outside, evaluate_callable, evaluate_samples, evaluate_student
from harness.files import patched_cache, read_yaml
from harness.methods import METHODS
from harness.metrics import METRICS
from harness.options import RUN_FIELDS, Group, MethodCommand, chosen_device, common, field_options
from harness.plugins import load_plugin
from harness.preview import Preview, preview
from harness.records import PACKAGES, capture_environment, package_version
from harness.report.console import print_results
from harness.report.markdown import page, publish
from harness.report.tables import load_records, results_table, rows_of
from harness.run import run
from harness.solvers import SOLVERS
from harness.sweep import expand, plan, run_sweep
from harness.tasks import load_task, task_names
from harness.teacher import search, train_networks, verify


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
@click.option("--dry-run", is_flag=True, help="Only show the settled config, what is cached, MACs and an estimate of the time.")
@common(results=True, device=True)
@click.pass_context
def run_command(ctx: click.Context, method: str | None, config: str | None, assignments: tuple[str, ...], reuse: bool, dry_run: bool,
                as_json: bool, results: Path, device: str, **given: str | None) -> None:  # fmt: skip
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
    asked = parse_config({**values, "options": options})
    if dry_run:
        show_preview(preview(resolve(asked, results=results, device=chosen_device(device)), results, chosen_device(device)), as_json)
        return
    console = Console(stderr=True)
    with Display(console) as display:
        record, reference = run(asked, results, chosen_device(device), display, reuse)
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
@click.option("--storage", metavar="URL", help="Database of a search's studies [default: searches.db in the results folder].")
@common(results=True, device=True)
def sweep_command(file: str, dry_run: bool, reuse: bool, storage: str | None, as_json: bool, results: Path, device: str) -> None:
    """Run all that a sweep file asks for; finished runs are skipped and interrupted ones resumed.

    A file with `search` is a search by Optuna. The same command in a second terminal shares the work.
    """
    where = chosen_device(device)
    content = read_yaml(Path(file))
    if "search" in content:
        run_searches(content, file, dry_run, reuse, storage, as_json, results, where)
        return
    if storage is not None:
        raise UsageError(f"--storage is where a search keeps its studies, but {file} has no search: leave it out")
    cells = plan(expand(content, f"sweep file {file}"), results, where, reuse)
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


def run_searches(content: dict[str, Any], file: str, dry_run: bool, reuse: bool, storage: str | None, as_json: bool, results: Path,
                 device: torch.device) -> None:  # fmt: skip
    """What `harness sweep` does with a file that has `search`."""
    from harness.search import Searcher, default_storage, lines_of, open_study, searches  # Optuna takes long to import

    found = searches(content, f"sweep file {file}", results, device)
    console = Console(stderr=True)
    if dry_run and storage is None and not (results / "searches.db").exists():
        studies = []
    elif dry_run:
        studies = [open_study(search, storage or default_storage(results)) for search in found]
    else:
        storage = storage or default_storage(results)
        with Display(console) as display:
            searcher = Searcher(results, device, storage, display, reuse, lambda text: console.print(text, highlight=False))
            studies = [searcher.make(search) for search in found]
    lines = [line for search, study in zip(found, studies, strict=False) for line in lines_of(search, study)]
    if as_json:
        click.echo(json.dumps(lines, indent=1))
        return
    for line in lines:
        shown = ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                          for name, value in line.items() if name not in ("study", "trial", "state", "best"))  # fmt: skip
        click.echo(f"{'*' if line['best'] else ' '} {line['study']} trial {line['trial']} {line['state']}: {shown}")
    made = sum(line["state"] not in ("running", "waiting") for line in lines)
    click.echo(f"{made} of {sum(search.spec.trials for search in found)} trials made in {len(found)} studies; * is best, or on the front")
    if lines and not dry_run and not any(line["best"] for line in lines):
        raise RunFailed("no trial finished: their records say why")


def show_preview(found: Preview, as_json: bool) -> None:
    """Prints what a run would do."""
    if as_json:
        click.echo(json.dumps(vars(found), indent=1))
        return
    click.echo(f"{found.run_id}: {found.state}\n\nmethod: {found.method}")
    click.echo(yaml.safe_dump({"config": found.config, "options": found.options}, sort_keys=False))
    click.echo(f"{found.nfe:g} network passes and {found.macs_per_sample / 1e6:.1f} MMACs a sample")
    for name, there in found.cached.items():
        click.echo(f"{name}: {'there' if there else 'to be made'}")
    if found.seconds:
        parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found.seconds.items())
        click.echo(f"about {sum(found.seconds.values()):.0f} s on {torch.get_num_threads()} threads, metrics not counted: {parts}")


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
            name: f"{direction} is better" if direction != "none" else "neither way is better" for name, direction in directions().items()
        }
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


@main.command("describe")
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
    elif name in directions():
        doc = (inspect.getdoc(METRICS[name]) or "") if name in METRICS.names() else "needs more than samples: not every run has it"
        facts = {"direction": directions()[name]}
    else:
        raise unknown("name", name, [*METHODS.names(), *task_names(), *SOLVERS.names(), *directions()])
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


@main.command("evaluate", cls=MethodCommand)
@click.option("--samples", type=click.Path(path_type=Path), help="File .npz with arr_0, uint8 [n, H, W, C], and arr_1, labels, if known.")
@click.option("--student", type=click.Path(path_type=Path), help="Safetensors of a student; --method says how it is sampled.")
@click.option("--callable", "function", metavar="MODULE:FUNCTION", help="From noise [B, C, H, W] and labels [B] to samples.")
@click.option("--method", metavar="NAME", help="Method whose sampler a student uses.")
@click.option("--task", default="digits", show_default=True)
@click.option("--num-steps", default=1, show_default=True, type=click.IntRange(1, 1000), help="Sampling steps, measured or as stated.")
@click.option("--name", help="What the table calls it [default: the file's or function's name].")
@click.option("--stated", default="", help="What its training cost, in its author's words.")
@common(results=True, device=True)
def evaluate_command(samples: Path | None, student: Path | None, function: str | None, method: str | None, task: str, num_steps: int,
                     name: str | None, stated: str, as_json: bool, results: Path, device: str, **options: str | None) -> None:  # fmt: skip
    """Evaluate work that was not trained here: same metrics, same record, bill as stated."""
    given = [thing for thing in (samples, student, function) if thing is not None]
    if len(given) != 1:
        raise UsageError("give one of --samples, --student and --callable")
    outside = Outside(name or Path(str(given[0]).replace(":", ".")).stem, num_steps, stated)
    where = chosen_device(device)
    with Display(Console(stderr=True)) as display:
        if samples is not None:
            record = evaluate_samples(samples, outside, load_task(task), results, where, display)
        elif function is not None:
            record = evaluate_callable(function, outside, load_task(task), results, where, display)
        else:
            if method is None:
                raise UsageError("--student needs --method, which says how it is sampled")
            chosen = {key: value for key, value in options.items() if value is not None}
            config = parse_config({"method": method, "task": task, "num_steps": num_steps, "options": chosen})
            record = evaluate_student(student, config, outside, results, where, display)  # type: ignore[arg-type]
    if as_json:
        click.echo(record.model_dump_json(indent=1))
        return
    print_results([record], Console())
    click.echo(f"record: {results / 'runs' / record.run_id / 'record.json'}")


@main.command("test-method")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--method", help="Name of one method; otherwise all that FILE registers.", metavar="NAME")
@click.option("--set", "assignments", multiple=True, help="KEY=VALUE for an option of the method.", metavar="KEY=VALUE")
@common()
def test_method_command(file: Path, method: str | None, assignments: tuple[str, ...], as_json: bool) -> None:
    """Check that the methods of FILE keep the contract: isolation of players, accumulation, resume, keyed randomness, ..."""
    before = set(METHODS.names())
    load_plugin(file)
    found = [method] if method else sorted(set(METHODS.names()) - before)
    if not found:
        raise UsageError(f"{file} registers no method; decorate a class with @METHODS.register(NAME)")
    options = dict(assignment.partition("=")[::2] for assignment in assignments)
    outcomes: dict[str, list[Outcome]] = {}
    with tempfile.TemporaryDirectory() as folder, patched_cache(Path(folder) / "cache"):
        for name in found:
            parsed = parse_options(name, options).model_dump()
            outcomes[name] = []
            for outcome in run_checks(name, Path(folder) / name, parsed):
                outcomes[name].append(outcome)
                if not as_json:
                    click.echo(f"{name}: {'FAILED' if outcome.problem else 'ok    '} {outcome.check:13} {outcome.problem or outcome.what}")
    if as_json:
        click.echo(json.dumps({name: [vars(outcome) for outcome in those] for name, those in outcomes.items()}, indent=1))
    failed = [f"{name} {outcome.check}" for name, those in outcomes.items() for outcome in those if outcome.problem]
    if failed:
        raise CheckFailed(f"{len(failed)} checks failed: {', '.join(failed)}")


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
    """Train or verify the networks that ship with a task; search for a sampler's levels."""


@teacher_group.command("train")
@click.option("--task", default="digits", show_default=True)
@common(results=True, device=True)
def teacher_train(task: str, results: Path, device: str, as_json: bool) -> None:
    """Train a task's own feature network and teacher, and scan guidance; resumes where it was interrupted."""
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


@teacher_group.command("levels")
@click.option("--task", default="digits", show_default=True)
@click.option("--num-steps", type=int, default=4, show_default=True)
@click.option("--solver", default="ddim", show_default=True, help="harness list solvers lists them.")
@click.option("--count", type=click.IntRange(1), default=64, show_default=True, help="Trajectories to search with.")
@common(device=True)
def teacher_levels(task: str, num_steps: int, solver: str, count: int, device: str, as_json: bool) -> None:
    """Search for the levels on which few steps end nearest to the full grid; they go to --levels of method teacher."""
    found = search(load_task(task), solver, num_steps, count, chosen_device(device))
    levels = [round(1000 * float(level)) for level in found.levels[1:-1]][::-1]
    told = {"levels": levels, "mse": found.mse, "mse_equally_spaced": found.equal_mse, "tried": found.tried, "trajectories": count}
    if as_json:
        click.echo(json.dumps(told, indent=1))
        return
    click.echo(f"--levels {','.join(map(str, levels))}")
    click.echo(f"mean square from the full grid's ends: {found.mse:.5f}, equally spaced {found.equal_mse:.5f}; "
               f"{found.tried} sets of levels tried on {count} trajectories")  # fmt: skip
