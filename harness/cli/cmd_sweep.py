"""`harness sweep`: a grid of runs, or searches. Floor 11."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from harness.cli.console import display_of_worker
from harness.cli.options import chosen_device, common, storage_option
from harness.errors import RunFailed, UsageError
from harness.files import read_yaml
from harness.provenance import PLUGIN_SOURCES
from harness.runs.database import database_url, storage_of
from harness.runs.preview import estimate
from harness.sweeps.submit import parameters_of, submit
from harness.sweeps.sweep import expand, plan, records_of, run_sweep, run_workers


@click.command("sweep")
@click.argument("file", metavar="FILE")
@click.option("--dry-run", is_flag=True, help="Only show what would run and what is already there.")
@click.option("--estimate", "timing", is_flag=True, help="With --dry-run: time a step of each setting, and say how long all would take.")
@click.option("--reuse", is_flag=True, help="Take finished records that other code made, published ones too.")
@click.option("--workers", default=1, type=click.IntRange(1, 256), show_default=True, help="Processes that share the work and the threads.")
@click.option("--submit", "cluster", type=click.Choice(["slurm", "local"]), help="Hand the workers in as jobs, by submitit, and return.")
@click.option("--submit-set", "parameters", multiple=True, metavar="KEY=VALUE", help="A parameter of submitit, such as timeout_min=60.")
@storage_option
@common(results=True, device=True)
def sweep_command(file: str, dry_run: bool, timing: bool, reuse: bool, workers: int, cluster: str | None, parameters: tuple[str, ...],
                  storage: str, as_json: bool, results: Path, device: str) -> None:  # fmt: skip
    """Run all that a sweep file asks for; finished runs are skipped and interrupted ones resumed.

    A file with `search` is a search by Optuna. The same command in a second terminal shares the work, and takes over from one that died.
    """
    where = chosen_device(device)
    if timing and not dry_run:
        raise UsageError("--estimate belongs to --dry-run: give both")
    if parameters and cluster is None:
        raise UsageError("--submit-set belongs to --submit: give both")
    if cluster == "slurm" and database_url(storage_of(results, storage)).get_backend_name() != "postgresql":
        raise UsageError("--submit slurm needs --storage postgresql+psycopg://...: a file does not serve several machines")
    content = read_yaml(Path(file))
    words = ["sweep", file, "--results", str(results), "--device", device, *(["--reuse"] if reuse else [])]
    words += [word for path in PLUGIN_SOURCES for word in ("--plugin", str(path))]
    start = partial(_start, words, workers, cluster, parameters, results, storage, as_json)
    if "search" in content:
        if timing:
            raise UsageError(f"--estimate times the runs of a grid, but {file} is a search, whose runs are not known yet: leave it out")
        run_searches(content, file, dry_run, reuse, storage, as_json, results, where, start)
        return
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
        others = sum(cell.record is None and cell.published for cell in cells)
        click.echo(f"{missing} of {len(cells)} runs to make" + (f"; {others} are published, made by other code: --reuse" if others else ""))
        if timing:
            parts = estimate([cell.resolved for cell in cells if cell.record is None], results, where)
            told = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in parts.items())
            click.echo(f"about {sum(parts.values()) / 60:.0f} minutes on {torch.get_num_threads()} threads, metrics not counted: {told}")
        return
    if start():
        return
    if workers > 1:
        records = records_of(cells, results)
    else:
        with display_of_worker() as display:
            records = run_sweep(cells, results, where, display, reuse, display.say, storage)
    if as_json:
        click.echo(json.dumps([json.loads(record.model_dump_json()) for record in records], indent=1))
        return
    failed = [record for record in records if record.status == "failed"]
    made = f"{len(records) - len(failed)} of {len(cells)} runs finished, {len(failed)} failed"
    if "HARNESS_WORKER" not in os.environ:  # whoever started the workers says it once
        click.echo(f"{made}; `harness report {results}` shows them")
    if failed:
        raise RunFailed(f"{len(failed)} of {len(cells)} runs failed: {', '.join(record.run_id for record in failed)}")


def _start(words: list[str], workers: int, cluster: str | None, parameters: tuple[str, ...], results: Path, storage: str,
           as_json: bool) -> bool:  # fmt: skip
    """Starts workers, if any are asked for, and waits for those of this machine; whether they go on as jobs without this process."""
    if cluster is not None:
        jobs = submit(words, workers, cluster, results / "jobs", parameters_of(parameters), storage)
        ids = [str(job.job_id) for job in jobs]
        where = " with this --storage" if storage else ""
        told = f"what they print is below {results / 'jobs'}, and `harness status {results}`{where} shows what they do"
        click.echo(json.dumps(ids) if as_json else f"jobs {', '.join(ids)}; {told}")
    elif workers > 1:
        run_workers(words, workers, storage)
    return cluster is not None


def run_searches(content: dict[str, Any], file: str, dry_run: bool, reuse: bool, storage: str, as_json: bool, results: Path,
                 device: torch.device, start: Callable[[], bool]) -> None:  # fmt: skip
    """What `harness sweep` does with a file that has `search`."""
    from harness.sweeps.search import Searcher, known_study, lines_of, searches  # Optuna takes long to import

    found = searches(content, f"sweep file {file}", results, device)
    count, trials = len(found), sum(search.spec.trials for search in found)
    if dry_run:
        studies = [study for search in found if (study := known_study(search, storage_of(results, storage))) is not None]
        found = [search for search in found if search.name in {study.study_name for study in studies}]
    elif start():
        return
    else:
        with display_of_worker() as display:
            searcher = Searcher(results, device, storage, display, reuse, display.say)
            studies = [searcher.make(search) for search in found]
    lines = [line for search, study in zip(found, studies, strict=False) for line in lines_of(search, study)]
    if "HARNESS_WORKER" in os.environ:  # whoever started the workers says it once
        return
    if as_json:
        click.echo(json.dumps(lines, indent=1))
        return
    for line in lines:
        shown = ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                          for name, value in line.items() if name not in ("study", "trial", "state", "best"))  # fmt: skip
        click.echo(f"{'*' if line['best'] else ' '} {line['study']} trial {line['trial']} {line['state']}: {shown}")
    made = sum(line["state"] not in ("running", "waiting") for line in lines)
    click.echo(f"{made} of {trials} trials made in {count} studies; * is best, or on the front "
               "(a winner is to be reported from seeds that its search has not used)")  # fmt: skip
    if lines and not dry_run and not any(line["best"] for line in lines):
        raise RunFailed("no trial finished: their records say why")
