"""Records to rows: one for each method and setting, its seeds together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.errors import NotComparable, UsageError
from harness.methods import METHODS
from harness.provenance import code_digest
from harness.records import Record, published_records, read_record
from harness.report.labels import label, off_default
from harness.runs.identity import all_options, row_key

HEADLINES = ("fid", "frechet_distance")
"""The metrics that rows are compared by; the first that a task has counts."""


@dataclass(frozen=True)
class Row:
    """The records of one method and setting, by seed."""

    label: str
    records: tuple[Record, ...]
    options: Mapping[str, Any]
    """All options in canonical form."""
    off_default: Mapping[str, Any]
    """The options that differ from their method's defaults."""

    @cached_property
    def finished(self) -> tuple[Record, ...]:
        return tuple(record for record in self.records if record.status == "finished")

    @property
    def shown(self) -> str:
        """The label, with the number of failed seeds where others finished."""
        failed = len(self.records) - len(self.finished)
        return self.label + (
            f" ({failed} of {len(self.records)} seeds failed)" if failed and self.finished else ""
        )

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
    runs = map(read_record, sorted(results.glob("runs/*/record.json")))
    found = {record.run_id: record for record in [*published_records(results), *runs]}
    if not found:
        raise UsageError(f"there is no record below {results}; `harness run` makes one")
    return latest_versions(list(found.values()))


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


def rows_of(records: Sequence[Record]) -> list[Row]:
    """Groups records that differ in the seed alone.

    Rows without training come first, then rows by training and steps. Of two records with one seed,
    the later in `present_last` counts.

    Raises NotComparable if metrics of one name have different identities in two records.
    """
    refuse_mixed_identities(records)
    groups: dict[str, tuple[dict[str, Any], list[Record]]] = {}
    for record in present_last(records):
        options = all_options(record)
        groups.setdefault(row_key(record, options), (options, []))[1].append(record)
    rows = []
    for options, group in groups.values():
        by_seed = {record.config["seed"]: record for record in group}
        off = off_default(group[0].method, options)
        rows.append(
            Row(
                label(group[0], options),
                tuple(by_seed[seed] for seed in sorted(by_seed)),
                options,
                off,
            )
        )
    return sorted(
        rows,
        key=lambda row: (
            row.training,
            row.num_steps * (1 if row.training[0] else -1),
            row.label,
            row.records[0].run_id,
        ),
    )


def refuse_mixed_identities(records: Sequence[Record]) -> None:
    """Raises NotComparable if two records' metrics of one name have different identities."""
    first: dict[str, Record] = {}
    for record in records:
        for name, metric in record.metrics.items():
            other = first.setdefault(name, record)
            theirs = other.metrics[name]
            if theirs.identity != metric.identity:
                keys = metric.identity.keys() | theirs.identity.keys()
                differing = sorted(
                    k for k in keys if metric.identity.get(k) != theirs.identity.get(k)
                )
                raise NotComparable(
                    f"{name} of {record.run_id} and of {other.run_id} are not comparable: "
                    f"they differ in {', '.join(differing)}; "
                    "keep them below results folders of their own"
                )


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
    """The metric that a task's rows are compared by; one of them must have finished."""
    metrics = next(record for row in rows for record in row.finished).metrics
    return next(name for name in HEADLINES if name in metrics)
