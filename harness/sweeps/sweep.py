"""Many runs from one file: expanded and checked before the first starts, and resumable at any time. Floor 8.

A file holds `base` (fields of a run), `cells` (what each differs in, over `base`), `axes` (name: values, for every cell that
does not say it, or in one), and `seeds`. Options of the method stand under `options`, in an axis as `options.NAME`.
Workers share a results folder and a database: a run is leased while it is made, and whoever finds it so goes on to the next.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from harness.errors import Busy, RunFailed, UsageError
from harness.records import Record, capture_environment, published_records, read_record
from harness.runs.config import Resolved, RunConfig, explain, key_of_record, parse_config, resolve
from harness.runs.log import Report, silent
from harness.runs.run import Run
from harness.tasks import load_task


class SweepCell(BaseModel):
    """What a cell may say; other keys are fields of a run."""

    model_config = ConfigDict(extra="allow", frozen=True)

    axes: dict[str, list[Any]] = {}
    seeds: list[int] | None = None
    options: dict[str, Any] = {}
    space: dict[str, Any] = {}
    """Of a search: what this cell's study varies beside the file's space."""


class SweepFile(BaseModel):
    """What a sweep file may say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: dict[str, Any] = {}
    axes: dict[str, list[Any]] = {}
    seeds: list[int] = [0]
    cells: list[SweepCell] = [SweepCell()]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep; its record if it is already there, and whether one of any code is published."""

    config: RunConfig
    resolved: Resolved
    record: Record | None
    published: bool = False


def expand(content: dict[str, Any], where: str) -> list[RunConfig]:
    """The runs of a sweep file, each once, in the order of the file: cells, then axes, then seeds.

    Raises UsageError for unknown keys and values of the wrong kind.
    """
    try:
        file = SweepFile.model_validate(content)
    except ValidationError as error:
        raise explain(error, where, list(SweepFile.model_fields)) from error
    found: dict[str, RunConfig] = {}
    for cell in file.cells:
        own = {**cell.model_extra, "options": cell.options} if cell.model_extra is not None else {"options": cell.options}
        if cell.space:
            raise UsageError(f"{where}: a cell has a space, but the file has no search")
        if "seed" in {*file.base, *file.axes, *own, *cell.axes}:
            raise UsageError(f"{where}: seed is given by itself; list the seeds under seeds")
        told = {*own, *(f"options.{name}" for name in cell.options)}
        axes = {name: values for name, values in file.axes.items() if name not in told} | cell.axes
        axes["seed"] = cell.seeds if cell.seeds is not None else file.seeds
        for values in itertools.product(*axes.values()):
            config = _merged(file.base, own, dict(zip(axes, values, strict=True)))
            found.setdefault(config.model_dump_json(), config)
    return list(found.values())


def _merged(base: dict[str, Any], cell: dict[str, Any], point: dict[str, Any]) -> RunConfig:
    """One run's config: options are merged, of everything else the more specific one counts."""
    options = {**base.get("options", {}), **cell["options"]}
    options |= {name.removeprefix("options."): value for name, value in point.items() if name.startswith("options.")}
    fields = {name: value for name, value in point.items() if not name.startswith("options.")}
    return parse_config({**base, **cell, **fields, "options": options})


def plan(configs: Sequence[RunConfig], results: Path, device: torch.device, reuse: bool = False) -> list[Cell]:
    """Every run resolved and looked up, equal ones once, before any is made.

    Args:
        reuse: also take what other code made.
    """
    code = capture_environment(device).code
    found = [record for record in published_records(results) if record.status == "finished"]
    published = {key_of_record(record): record for record in sorted(found, key=lambda record: record.environment.code == code)}
    cells: dict[str, Cell] = {}
    settled: dict[str, Resolved] = {}  # what seeds share: a budget in FLOPs takes seconds to count
    task_of = cache(load_task)  # with its data, once
    for config in configs:
        alike = config.model_dump_json(exclude={"seed"})
        if alike not in settled:
            try:
                settled[alike] = resolve(config, task_of(config.task), results, device)
            except UsageError as error:
                raise UsageError(f"{config.method} on {config.task}: {error}") from error
        resolved = settled[alike].with_seed(config.seed)
        known = published.get(resolved.key)
        taken = known if known is not None and (reuse or known.environment.code == code) else None
        record = Run(resolved, results, device).finished_record(reuse) or taken
        cells.setdefault(resolved.run_id, Cell(config, resolved, record, known is not None))
    return list(cells.values())


def run_sweep(cells: Sequence[Cell], results: Path, device: torch.device, report: Report = silent, reuse: bool = False,
              said: Callable[[str], None] = lambda text: None, storage: str = "") -> list[Record]:  # fmt: skip
    """Makes what is missing, one run after the other, together with other workers that are at the same (`storage` as in `Run`).

    What another worker is at is left to it and looked at again at the end: if that worker has died, its run is resumed here. A run
    that fails is a record too, and the sweep goes on. What only shows when a run is under way (weights that do not fit, a download
    that fails) raises UsageError; what is made by then stays.

    Returns:
        The records of all cells, in their order.
    """
    started, records = time.time(), {cell.resolved.run_id: cell.record for cell in cells if cell.record is not None}
    missing = [(number, cell) for number, cell in enumerate(cells, 1) if cell.record is None]
    waits = False
    while missing:
        busy = []
        for number, cell in missing:
            run = Run(cell.resolved, results, device, report, storage=storage)
            place = f"{number}/{len(cells)} {cell.resolved.run_id} seed {cell.resolved.settings.seed}"
            if (failed := _failed_since(run, started)) is not None:
                records[failed.run_id] = failed
                continue
            said(f"{place}: {'waits for the worker that is at it' if waits else 'starts'}")
            try:
                records[cell.resolved.run_id] = run.execute(reuse, waits)
            except Busy:
                said(f"{place}: another worker is at it")
                busy.append((number, cell))
            except RunFailed as error:
                said(f"{place}: {error}")
                records[cell.resolved.run_id] = read_record(run.folder / "record.json")
        missing, waits = busy, True
    return [records[cell.resolved.run_id] for cell in cells]


def _failed_since(run: Run, started: float) -> Record | None:
    """The record of a run that failed in another process since this one began."""
    path = run.folder / "record.json"
    if not path.exists() or path.stat().st_mtime < started:
        return None
    record = read_record(path)
    return record if record.status == "failed" else None


def records_of(cells: Sequence[Cell], results: Path) -> list[Record]:
    """The records of cells that are there now, finished or failed."""
    paths = [results / "runs" / cell.resolved.run_id / "record.json" for cell in cells]
    found = [cell.record or (read_record(path) if path.exists() else None) for cell, path in zip(cells, paths, strict=True)]
    return [record for record in found if record is not None]


def environment_of_workers(workers: int, storage: str = "", here: bool = True) -> dict[str, str]:
    """Variables that each of so many workers is started with.

    Args:
        storage: as in `harness.runs.database.storage_of`; others see the words of a process, and a URL may hold a password.
        here: whether they share the threads of this machine: with more of them than cores, each waits for the others at every step.
    """
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // workers))} if here else {}
    return {**threads, **({"HARNESS_STORAGE": storage} if storage else {})}


def run_workers(words: Sequence[str], workers: int, storage: str = "") -> None:
    """Runs `harness WORDS` in so many processes that share its work, each with its part of the threads.

    Raises RunFailed if one of them ends otherwise than by failed runs; the others go on to the end first.
    """
    environment = {**os.environ, **environment_of_workers(workers, storage)}
    command = [sys.executable, "-m", "harness", *words]
    names = [f"worker {number}" for number in range(1, workers + 1)]
    started = [subprocess.Popen(command, env={**environment, "HARNESS_WORKER": name}) for name in names]
    try:
        codes = [process.wait() for process in started]
    except BaseException:
        for process in started:
            process.terminate()  # each writes a checkpoint
        for process in started:
            process.wait()
        raise
    if bad := [code for code in codes if code not in (0, RunFailed.exit_code)]:
        raise RunFailed(f"{len(bad)} of {workers} workers ended with exit code {', '.join(map(str, bad))}; their messages are above")
