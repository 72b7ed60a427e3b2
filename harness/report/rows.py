"""Records to rows: one for each method and setting, its seeds together."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.errors import UsageError
from harness.files import inside
from harness.methods import METHODS
from harness.provenance import code_digest
from harness.records import Record, published_records, read_record
from harness.report.apart import Apart, told_apart
from harness.report.labels import label, off_task
from harness.report.statistics import Interval, metric_interval, number
from harness.runs.identity import all_options, row_key

HEADLINES = ("fid", "frechet_distance", "distance_to_teacher")
"""The metrics that rows are compared by, lower ones better; the first that a task has counts."""
ABSURD = 10
"""A seed has diverged if it failed, if its headline metric is not finite, or if that exceeds both
its row's best seed and the teacher this many times. Seeds of one setting that train differ by far
less; a row whose seeds are all bad is a bad method, not one that diverges."""


@dataclass(frozen=True)
class Row:
    """The records of one method and setting, by seed."""

    label: str
    records: tuple[Record, ...]
    options: Mapping[str, Any]
    """All options in canonical form."""
    off_task: Mapping[str, Any]
    """The options that differ from the task's defaults."""
    teacher: float = 0.0
    """The headline metric of the teacher's own output; 0 where there is none."""

    @cached_property
    def finished(self) -> tuple[Record, ...]:
        return tuple(record for record in self.records if record.status == "finished")

    @cached_property
    def diverged(self) -> tuple[Record, ...]:
        """The seeds that diverged (see `ABSURD`)."""
        values = {record.run_id: _headline_value(record) for record in self.finished}
        best = min(filter(math.isfinite, values.values()), default=0.0)
        limit = ABSURD * max(best, self.teacher)
        return tuple(
            record
            for record in self.records
            if record.run_id not in values
            or not math.isfinite(value := values[record.run_id])
            or value > limit
        )

    def interval(self, name: str) -> Interval:
        """A metric's mean and interval; an infinite mean where a seed diverged, which has none."""
        if self.diverged:
            return Interval(math.inf, math.nan)
        return metric_interval(self.finished, name)

    def text(self, name: str, digits: int) -> str:
        """A metric with its interval, or such as "1 of 3 seeds diverged: 787 (others 2.31, 4.58)".

        A failed seed has the word in the place of its number.
        """
        if not self.diverged:
            return self.interval(name).text(digits)
        gone = [
            number(record.metrics[name].mean, ".3g") if name in record.metrics else "failed"
            for record in self.diverged
        ]
        others = [
            number(record.metrics[name].mean, f".{digits}f")
            for record in self.finished
            if record.run_id not in {bad.run_id for bad in self.diverged}
        ]
        rest = f" (others {', '.join(others)})" if others else ""
        return f"{len(gone)} of {len(self.records)} seeds diverged: {', '.join(gone)}{rest}"

    @property
    def num_steps(self) -> int:
        return self.records[0].config["num_steps"]

    @property
    def training(self) -> tuple[int, int]:
        """Training steps and batch size; (0, 0) without training."""
        return self.records[0].config["total_steps"], self.records[0].config["batch_size"]

    @property
    def budget(self) -> tuple[int, int, int]:
        """Sampling steps, training steps and batch size."""
        return self.num_steps, *self.training


def load_records(results: Path) -> list[Record]:
    """The records of a results folder, or of one task's folder, at each task's latest version.

    Records of `runs/` replace published ones of equal run id. Raises UsageError if there is none.
    """
    paths = sorted(results.glob("runs/*/record.json"))
    with uncollected():
        runs = [read_record(inside(path, results)) for path in paths]
        found = {record.run_id: record for record in [*published_records(results), *runs]}
    if not found:
        raise UsageError(f"there is no record below {results}; `harness run` makes one")
    return latest_versions(list(found.values()))


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python looks for no cycles: records have none, and it takes a quarter of reading."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def latest_versions(records: Sequence[Record]) -> list[Record]:
    """The records of each task's latest version: numbers of two versions do not compare."""
    latest: dict[str, int] = {}
    for record in records:
        latest[record.task] = max(record.task_version, latest.get(record.task, 0))
    return [record for record in records if record.task_version == latest[record.task]]


def present_last(records: Iterable[Record]) -> list[Record]:
    """Records in rising order of preference: of the present code, finished, with most metrics."""
    here = code_digest()
    return sorted(
        records,
        key=lambda record: (
            record.environment.code == here,
            record.status == "finished",
            len(record.metrics),
        ),
    )


def is_trial(record: Record) -> bool:
    """Whether a record is a search's trial, which chose options."""
    return bool(record.config.get("purpose") == "tune")


def without_trials(records: Sequence[Record]) -> Sequence[Record]:
    """A task's records without trials; all of them where there are trials alone.

    What chose something is not averaged. A search's own folder shows its trials.
    """
    return [record for record in records if not is_trial(record)] or records


def rows_of(records: Sequence[Record]) -> list[Row]:
    """The rows of a task's records; see `rows_and_apart`."""
    return rows_and_apart(records)[0]


def rows_and_apart(records: Sequence[Record]) -> tuple[list[Row], list[Apart]]:
    """A task's rows, and the records that stand in none since their numbers do not compare.

    A row holds records that differ in the seed alone, without trials. Of two records with one seed,
    the later in `present_last` counts. Rows without training come first, then rows by training and
    steps.
    """
    together, apart = told_apart(present_last(without_trials(records)))
    return sorted(_grouped(together), key=_place), apart


def _place(row: Row) -> tuple[Any, ...]:
    """A row's place in a table."""
    steps = row.num_steps * (1 if row.training[0] else -1)
    return row.training, steps, row.label, row.records[0].run_id


def _grouped(records: Sequence[Record]) -> Iterator[Row]:
    """Groups records that differ in the seed alone; of one seed the last counts."""
    reference = reference_record(record for record in records if record.status == "finished")
    teacher = _headline_value(reference) if reference else 0.0
    groups: dict[str, tuple[dict[str, Any], list[Record]]] = {}
    for record in records:
        options = all_options(record)
        groups.setdefault(row_key(record, options), (options, []))[1].append(record)
    for options, group in groups.values():
        by_seed = {record.config["seed"]: record for record in group}
        seeds = tuple(by_seed[seed] for seed in sorted(by_seed))
        yield Row(label(group[0], options), seeds, options, off_task(group[0], options), teacher)


def trains(record: Record) -> bool:
    """Whether a record's method trains."""
    return record.method in METHODS.names() and bool(METHODS[record.method].sources)


def reference_record(records: Iterable[Record]) -> Record | None:
    """The teacher's own output among a task's finished records, to which distances are measured.

    Of several, the one with most noise sets; None if there is none.
    """
    distances = [
        (record, record.metrics["distance_to_teacher"])
        for record in records
        if "distance_to_teacher" in record.metrics
    ]
    own = [record for record, distance in distances if distance.mean == 0]
    return max(
        own, key=lambda record: len(record.metrics["distance_to_teacher"].values), default=None
    )


def headline(rows: Sequence[Row]) -> str:
    """The metric that a task's rows are compared by; one of them must have finished.

    Raises UsageError for a finished record without any of these metrics.
    """
    first = next(record for row in rows for record in row.finished)
    if found := [name for name in HEADLINES if name in first.metrics]:
        return found[0]
    raise UsageError(f"record {first.run_id} has none of the metrics {', '.join(HEADLINES)}")


def _headline_value(record: Record) -> float:
    """A record's headline metric; 0 where it has none."""
    name = next((name for name in HEADLINES if name in record.metrics), None)
    return record.metrics[name].mean if name else 0.0
