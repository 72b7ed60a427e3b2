"""A sweep: many runs from one file, all checked before the first starts, and resumable at any time.

A file holds `base` (fields of a run), `cells` (what each adds to `base`), `axes` (name: values, for
every cell that does not give the name itself, or inside one cell), and `seeds`. Options of the
method stand under `options`, in an axis as `options.NAME`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from harness.errors import UsageError, standing_in
from harness.provenance import capture_environment
from harness.records import Record, published_records, read_record
from harness.runs.config import RunConfig, explain, parse_config
from harness.runs.identity import key_of_record
from harness.runs.locks import held, is_held
from harness.runs.resolve import Resolved, resolve
from harness.runs.run import Run
from harness.sweeps.child import UNTRACKED, Tracking, job_of
from harness.sweeps.driver import Driver
from harness.tasks import load_task

MOST_RUNS = 10**5
"""Runs of one file, before equal ones are left out."""
VISIBLE_WITHIN = 60.0
"""Seconds in which a record that another machine wrote becomes visible."""


class SweepCell(BaseModel):
    """A cell of a sweep file; other keys are fields of a run."""

    model_config = ConfigDict(extra="allow", frozen=True)

    axes: dict[str, list[Any]] = {}
    seeds: list[int] | None = None
    options: dict[str, Any] = {}
    space: dict[str, Any] = {}
    """In a search: what this cell's study varies in addition to the file's space."""


class SweepFile(BaseModel):
    """The top level of a sweep file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: dict[str, Any] = {}
    axes: dict[str, list[Any]] = {}
    seeds: list[int] = [0]
    cells: list[SweepCell] = [SweepCell()]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        record: the finished one, if there is one.
        published: whether a record of this run, made by any code, is published.
    """

    config: RunConfig
    resolved: Resolved
    record: Record | None
    published: bool = False


def expand(content: dict[str, Any], where: str) -> list[RunConfig]:
    """Returns the runs of a sweep file, each once, in its order: cells, then axes, then seeds.

    Args:
        where: names the file in errors.

    Raises UsageError for unknown keys and values of the wrong kind.
    """
    try:
        file = SweepFile.model_validate(content)
    except ValidationError as error:
        raise explain(error, where, list(SweepFile.model_fields)) from error
    with standing_in(where):
        return _expanded(file, where)


def _expanded(file: SweepFile, where: str) -> list[RunConfig]:
    found: dict[str, RunConfig] = {}
    for cell in file.cells:
        own = (
            {**cell.model_extra, "options": cell.options}
            if cell.model_extra is not None
            else {"options": cell.options}
        )
        if cell.space:
            raise UsageError(f"{where}: a cell has a space, but the file has no search")
        if "seed" in {*file.base, *file.axes, *own, *cell.axes}:
            raise UsageError(f"{where}: seed is given by itself; list the seeds under seeds")
        given = {*own, *(f"options.{name}" for name in cell.options)}
        axes = {name: values for name, values in file.axes.items() if name not in given} | cell.axes
        axes["seed"] = cell.seeds if cell.seeds is not None else file.seeds
        if (count := math.prod(map(len, axes.values()))) > MOST_RUNS:
            raise UsageError(
                f"{where}: the axes of a cell make {count:.3g} runs, "
                f"but a file has at most {MOST_RUNS}: divide it"
            )
        for values in itertools.product(*axes.values()):
            config = _merged(file.base, own, dict(zip(axes, values, strict=True)))
            found.setdefault(config.model_dump_json(), config)
    return list(found.values())


def _merged(base: dict[str, Any], cell: dict[str, Any], point: dict[str, Any]) -> RunConfig:
    """One run's config: options are merged; any other field comes from the most specific place."""
    own = base.get("options", {})
    if not isinstance(own, dict):
        raise UsageError(f"base.options is {own!r}, but should be a mapping from names to values")
    options = {**own, **cell["options"]}
    options |= {
        name.removeprefix("options."): value
        for name, value in point.items()
        if name.startswith("options.")
    }
    fields = {name: value for name, value in point.items() if not name.startswith("options.")}
    return parse_config({**base, **cell, **fields, "options": options})


def plan(
    configs: Sequence[RunConfig], results: Path, device: torch.device, reuse: bool = False
) -> list[Cell]:
    """Resolves every run and looks its record up; equal runs become one cell.

    Args:
        reuse: also take records that other code made.

    Raises UsageError for the first run that does not fit.
    """
    code = capture_environment(device).code
    found = [record for record in published_records(results) if record.status == "finished"]
    published = {
        key_of_record(record): record
        for record in sorted(found, key=lambda record: record.environment.code == code)
    }
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


def run_sweep(
    cells: Sequence[Cell],
    results: Path,
    device: torch.device,
    driver: Driver[Cell],
    reuse: bool = False,
    say: Callable[[str], None] = print,
    tracking: Tracking = UNTRACKED,
) -> list[Record]:
    """Makes the runs that are missing, and returns the records of all cells, in their order.

    As many runs are made at once as the driver takes. A run that another process makes comes last,
    and is then waited for. A run that fails is a record too, and the sweep goes on.

    Args:
        reuse: take finished records that other code made.
        say: prints a line.
        tracking: what follows the runs that are made.

    Raises UsageError for what only shows inside a run, such as weights that do not fit.
    """
    records = {cell.resolved.run_id: cell.record for cell in cells if cell.record is not None}
    names = _names(cells)
    waiting = [cell for cell in cells if cell.record is None]
    with driver:
        while waiting or driver.flying:
            if (cell := _next_free(waiting, driver, results, device)) is not None:
                waiting.remove(cell)
                name = names[cell.resolved.run_id]
                say(f"{name} seed {cell.resolved.settings.seed}: starts")
                name = name if driver.workers > 1 else ""
                job = job_of(
                    cell.config, cell.resolved, results, device, reuse, name, tracking=tracking
                )
                driver.start(cell, job)
                continue
            known = len(driver.lost)
            cell, died = driver.next()
            for _, reason in driver.lost[known:] if not died else ():
                say(f"{names[cell.resolved.run_id]}: its process died by {reason}; started again")
            record = record_of(Run(cell.resolved, results, device), died)
            records[cell.resolved.run_id] = record
            reason = f": {record.reason}" if record.reason else ""
            say(f"{names[cell.resolved.run_id]}: {record.status}{reason}")
    return [records[cell.resolved.run_id] for cell in cells]


def _names(cells: Sequence[Cell]) -> dict[str, str]:
    """The runs' names in messages, by run_id: with their places in the sweep."""
    return {
        cell.resolved.run_id: f"{number}/{len(cells)} {cell.resolved.run_id}"
        for number, cell in enumerate(cells, 1)
    }


def _next_free(
    waiting: Sequence[Cell], driver: Driver[Cell], results: Path, device: torch.device
) -> Cell | None:
    """The first cell whose run and student nothing in flight and no other process works on.

    Without one: None while something is in flight, then the first cell, whose job waits for the
    other process. None too if no cell is waiting or the driver takes no more.
    """
    if not waiting or driver.full:
        return None

    def locks(cell: Cell) -> list[str]:
        return Run(cell.resolved, results, device).locks

    taken = {name for cell in driver.flying.values() for name in locks(cell)}
    for cell in waiting:
        if not any(name in taken or is_held(results, name) for name in locks(cell)):
            return cell
    return None if driver.flying else waiting[0]


def record_of(run: Run, died: str) -> Record:
    """The record that a run's job left, or one that says why its process died.

    On a shared file system the record of another machine may become visible after a while.
    """
    if died:
        with held(run.results, *run.locks, wait=True):
            return run.finished_record() or run.record_failure(died)
    path, waited_until = run.folder / "record.json", time.monotonic() + VISIBLE_WITHIN
    while not path.exists() and time.monotonic() < waited_until:
        time.sleep(0.5)
    return read_record(path)
