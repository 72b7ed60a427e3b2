"""`harness evaluate` and `harness test-method`: samples, students and methods from outside."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli.options import (
    DEFAULT_TASK,
    MethodCommand,
    chosen,
    chosen_device,
    common,
    complete_methods,
    save_samples_option,
)
from harness.errors import CheckFailed, UsageError
from harness.registry import registry_of

if TYPE_CHECKING:
    from harness.records import Record


@click.command("evaluate", cls=MethodCommand)
@click.option(
    "--samples",
    type=click.Path(path_type=Path),
    help="File .npz: arr_0, images, uint8 [n, H, W, C]; arr_1, labels, if known. "
    "Or a folder of PNG, with a subfolder for each class if labels are known, or in GenEval's "
    "layout, with a subfolder for each prompt.",
)
@click.option(
    "--geneval-results",
    "verdicts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Result lines of any judge in GenEval's form: a JSON mapping with tag, prompt and correct "
    "on each line.",
)
@click.option("--judge", "judge_name", help="Who made the result lines [default: unknown].")
@click.option(
    "--student",
    type=click.Path(path_type=Path),
    help="Safetensors file of a student; without metadata of ours it needs --method.",
)
@click.option(
    "--callable",
    "function",
    metavar="MODULE:FUNCTION",
    help="Function from noise [B, C, H, W] and labels [B] to samples; "
    "the current directory is on the import path.",
)
@click.option(
    "--method",
    metavar="NAME",
    help="Method whose sampler the student uses.",
    shell_complete=complete_methods,
)
@click.option(
    "--task",
    help=f"Name of a task, or a task file [default: that of the student, or {DEFAULT_TASK}].",
)
@click.option(
    "--num-steps",
    type=click.IntRange(1, 1000),
    help="Sampling steps [default: those of the student, or 1].",
)
@click.option("--name", help="Name in tables [default: that of the file or function].")
@click.option("--stated", default="", help="What its training cost, as its author states it.")
@save_samples_option
@common(results=True, device=True)
def evaluate_command(
    samples: Path | None,
    verdicts: Path | None,
    judge_name: str | None,
    student: Path | None,
    function: str | None,
    method: str | None,
    task: str | None,
    num_steps: int | None,
    name: str | None,
    stated: str,
    save_samples: str | None,
    as_json: bool,
    results: Path,
    device: str,
    **options: str | None,
) -> None:
    """Evaluate samples, a student or a function from outside: same metrics, same record.

    With --geneval-results a record holds the verdicts of another judge.
    """
    source = _source(samples, student, function, verdicts)
    if verdicts is None and judge_name is not None:
        raise UsageError("--judge names who made --geneval-results: give both, or neither")

    from harness.cli.console import Display, Plain
    from harness.runs.external import Outside, evaluate_callable, evaluate_samples, evaluate_student
    from harness.runs.saving import check_form
    from harness.runs.student_file import student_config
    from harness.runs.verdicts import evaluate_results
    from harness.tasks import load_task

    if student is not None:
        asked = {"method": method, "task": task, "num_steps": num_steps, "options": chosen(options)}
        config = student_config(student, chosen(asked))
        task, num_steps = config.task, config.num_steps
    task = task or DEFAULT_TASK
    outside = Outside(name or Path(source.replace(":", ".")).stem, num_steps or 1, stated)
    where, judge = chosen_device(device), load_task(task)
    save = check_form(save_samples, judge)
    if verdicts is not None:
        if save:
            raise UsageError("result lines have no samples: leave --save-samples out")
        asked_of = judge_name or "unknown"
        record = evaluate_results(verdicts, asked_of, outside, judge, results, where)
        print_shares(record, results, as_json)
        return
    with Display(Plain(stderr=True)) as display:
        if samples is not None:
            record = evaluate_samples(samples, outside, judge, results, where, display, save)
        elif function is not None:
            record = evaluate_callable(function, outside, judge, results, where, display, save)
        elif student is not None:
            record = evaluate_student(student, config, outside, results, where, display, save)
    warn_of_size(record, task, judge.spec.evaluation.samples)
    print_record(record, results, as_json)


def _source(*things: Path | str | None) -> str:
    """The file or function to evaluate. Raises UsageError unless there is just one."""
    given = [thing for thing in things if thing is not None]
    if len(given) != 1:
        raise UsageError("give one of --samples, --student, --callable and --geneval-results")
    return str(given[0])


def print_shares(record: Record, results: Path, as_json: bool) -> None:
    """Prints the record of an outside judge: followed, of how many, for each kind of prompt."""
    if as_json:
        click.echo(record.model_dump_json(indent=1))
        return
    for name, metric in record.metrics.items():
        click.echo(f"{name.removeprefix('followed_')}: {metric.mean:.1%} of {metric.n}")
    click.echo(f"record: {results / 'runs' / record.run_id / 'record.json'}")


def print_record(record: Record, results: Path, as_json: bool) -> None:
    """Prints a record."""
    if as_json:
        click.echo(record.model_dump_json(indent=1))
        return

    from harness.cli.console import Plain
    from harness.report.console import print_results

    print_results([record], Plain())
    click.echo(f"record: {results / 'runs' / record.run_id / 'record.json'}")


def warn_of_size(record: Record, task: str, expected: int) -> None:
    """Warns if the metrics rest on another number of samples than the rows of the task."""
    n = max(
        (metric.n for name, metric in record.metrics.items() if not name.endswith("_floor")),
        default=expected,
    )
    if n != expected:
        click.echo(
            f"harness: these are {n} samples, but rows of {task} have {expected}: "
            "a report shows them in a section of their own",
            err=True,
        )


@click.command("test-method")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--method", help="Name of one method [default: all that FILE registers].", metavar="NAME"
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    help="KEY=VALUE for an option of the method.",
    metavar="KEY=VALUE",
)
@click.option("--prompts", is_flag=True, help="Check on a task with prompts for class labels.")
@click.option("--ranks", is_flag=True, help="Check too that two ranks train as one process does.")
@common()
def test_method_command(
    file: Path,
    method: str | None,
    assignments: tuple[str, ...],
    prompts: bool,
    ranks: bool,
    as_json: bool,
) -> None:
    """Check that the methods of FILE keep the contract of a method.

    Among others: players are isolated, accumulation equals a large batch, resume is exact, and
    randomness is keyed.
    """
    registered = _registered(file)
    names = [method] if method else registered
    if not names:
        raise UsageError(
            f"{file} registers no method; decorate a class with @METHODS.register(NAME)"
        )
    options = dict(assignment.partition("=")[::2] for assignment in assignments)
    outcomes = _outcomes(names, options, {"prompts": prompts, "ranks": ranks}, quiet=as_json)
    if as_json:
        click.echo(
            json.dumps(
                {name: [vars(outcome) for outcome in those] for name, those in outcomes.items()},
                indent=1,
            )
        )
    failed = [
        f"{name} {outcome.check}"
        for name, those in outcomes.items()
        for outcome in those
        if outcome.problem
    ]
    if failed:
        raise CheckFailed(f"{len(failed)} checks failed: {', '.join(failed)}")


def _registered(file: Path) -> list[str]:
    """The names of the methods that a file registers."""
    from harness.plugins import load_plugin

    methods = registry_of("method")
    before = set(methods.names())
    load_plugin(file)
    return sorted(set(methods.names()) - before)


def _outcomes(
    names: list[str], options: dict[str, str], what: dict[str, bool], quiet: bool
) -> dict[str, list[Any]]:
    """The outcomes of all checks, by method; without `quiet` each is printed at once."""
    from harness.files import environment_with
    from harness.runs.config import parse_options
    from harness.training.contract import run_checks

    found: dict[str, list[Any]] = {name: [] for name in names}
    with (
        tempfile.TemporaryDirectory() as folder,
        environment_with(HARNESS_CACHE=str(Path(folder) / "cache")),
    ):
        for name in names:
            parsed = parse_options(name, options).model_dump()
            for outcome in run_checks(name, Path(folder) / name, parsed, **what):
                found[name].append(outcome)
                if not quiet:
                    click.echo(
                        f"{name}: {'FAILED' if outcome.problem else 'ok    '} {outcome.check:13} "
                        f"{outcome.problem or outcome.what}"
                    )
    return found
