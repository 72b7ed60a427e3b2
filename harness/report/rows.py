"""Records to rows: one for each method and setting, its seeds together; their names, and which differ in one thing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, reduce
from itertools import combinations
from operator import xor
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from harness.errors import NotComparable, UsageError
from harness.methods import METHODS
from harness.provenance import code_digest
from harness.records import Record, published_records, read_record
from harness.report.statistics import metric_interval
from harness.runs.identity import PLAIN_SETTINGS, all_options, settings_of
from harness.tasks import load_task, task_names

HEADLINES = ("fid", "frechet_distance")
"""The metric of differences and curves: the first that a task has."""
CROWD = 30
"""Rows that differ in one thing, above which not all pairs are shown."""


@dataclass(frozen=True)
class Row:
    """The records of one method and setting, by seed."""

    label: str
    records: tuple[Record, ...]
    options: Mapping[str, Any]
    """As `all_options` gives them."""
    off_default: Mapping[str, Any]
    """Those that differ from their method's defaults."""

    @cached_property
    def finished(self) -> tuple[Record, ...]:
        return tuple(record for record in self.records if record.status == "finished")

    @property
    def shown(self) -> str:
        """Its label, and how many of its seeds failed where others did not."""
        failed = len(self.records) - len(self.finished)
        return self.label + (f" ({failed} of {len(self.records)} seeds failed)" if failed and self.finished else "")

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
    """The published records below a results folder or in a task's, and those of `runs/`, which replace published ones of equal run id.

    Raises UsageError if there is none.
    """
    runs = map(read_record, sorted(results.glob("runs/*/record.json")))
    found = {record.run_id: record for record in [*published_records(results), *runs]}
    if not found:
        raise UsageError(f"there is no record below {results}; `harness run` makes one")
    return list(found.values())


def counted(number: int, what: str = "step") -> str:
    """Such as "1 step" or "4 steps"."""
    return f"{number} {what}{'s' if number != 1 else ''}"


def label(record: Record, options: Mapping[str, Any] | None = None) -> str:
    """Method and the options that matter: those marked for labels and those that differ from the default.

    Args:
        options: what `all_options` gives for the record, where it is known.
    """
    options, config = all_options(record) if options is None else options, settings_of(record.config)
    off = off_default(record.method, options)
    if record.method in METHODS.names():
        fields = METHODS[record.method].Config.model_fields
        told = [name for name in options if name in fields and in_label(fields[name])]
        off = {name: options[name] for name in told} | off
    off |= {name: config[name] for name, plain in PLAIN_SETTINGS.items() if config.get(name, plain) != plain}
    return record.method + "".join(f", {name} {_shown(value)}" for name, value in off.items())


def off_default(method: str, options: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options that differ from their method's defaults.

    Args:
        given: what is the default of a task in the place of the method's own.
    """
    plain = _plain(METHODS[method].Config, json.dumps(given or {})) if method in METHODS.names() else {}
    return {name: value for name, value in options.items() if name not in plain or value != plain[name]}


@cache
def _plain(config: type[BaseModel], given: str) -> dict[str, Any]:
    return config(**json.loads(given)).model_dump(mode="json")


def defaults_of(task: str) -> Mapping[str, Mapping[str, Any]]:
    """By method, the options that it has on a task if nothing is said; none for a task that is not here."""
    return load_task(task).spec.defaults if task in task_names() else {}


def _shown(value: Any) -> str:
    """A list as it is typed, a long number with four digits."""
    if isinstance(value, float) and len(str(value)) > len("0.00054"):
        return f"{value:.4g}"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def off_task(row: Row, tuned: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The options that a task does not run the row's method with anyway.

    Args:
        tuned: as `defaults_of` gives it.
    """
    method = row.records[0].method
    return off_default(method, row.options, tuned.get(method))


def neighbours(rows: Sequence[Row], name: str) -> tuple[list[tuple[Row, Row]], Counter[tuple[int, ...]]]:
    """Pairs of rows that differ in one thing: the method, an option off its default on this task, or a setting other than steps and
    training.

    Of more than `CROWD` rows that differ in the same thing each is paired with the best alone. The best is learnt from the numbers that
    are compared then, so that the pairs left out belong to the family as well: how many of them there are, by `Row.budget`.
    """
    sides, tuned = [], defaults_of(rows[0].records[0].task) if rows else {}
    for row in rows:
        record = row.records[0]
        side = {"method": record.method, **off_task(row, tuned), **settings_of(record.config), "rows": row.budget}
        sides.append(dict.fromkeys(_options_of(record), "") | side)  # what is at its default says nothing to another method
    buckets = alike_but_one(sides, [side.keys() - {"rows"} for side in sides])
    found, left_out = set(), Counter[tuple[int, ...]]()
    for members in buckets.values():
        pairs = set(combinations(members, 2))
        if len(members) > CROWD:
            best = min(members, key=lambda number: metric_interval(rows[number].finished, name).mean)
            left_out[rows[best].budget] += sum(best not in pair for pair in pairs)
            pairs = {pair for pair in pairs if best in pair}
        found |= pairs
    return [(rows[a], rows[b]) for a, b in sorted(found)], left_out


def alike_but_one(sides: Sequence[Mapping[str, Any]], axes: Sequence[Iterable[str]]) -> dict[tuple[str, int], list[int]]:
    """Groups (by their places) of what is equal in all but one thing; a value of "" counts as nothing.

    Args:
        sides: name: value of each.
        axes: the names that may be that one thing, for each.
    """
    first = {name: repr(value) for name, value in sides[0].items()} if sides else {}
    varying: set[str] = set()
    for side in sides:
        varying |= {name for name in first.keys() | side.keys() if first.get(name, "''") != repr(side.get(name, ""))}
    groups: dict[tuple[str, int], list[int]] = {}
    for place, (side, names) in enumerate(zip(sides, axes, strict=True)):
        marks = {name: hash((name, repr(side[name]))) for name in varying & side.keys() if side[name] != ""}
        whole = reduce(xor, marks.values(), 0)
        for name in names:
            if name in varying:
                groups.setdefault((name, whole ^ marks.get(name, 0)), []).append(place)
    return groups


def _options_of(record: Record) -> list[str]:
    return list(METHODS[record.method].Config.model_fields) if record.method in METHODS.names() else []


def in_label(option: FieldInfo) -> bool:
    """Whether every table names an option."""
    return isinstance(option.json_schema_extra, dict) and bool(option.json_schema_extra.get("in_label"))


def present_last(records: Iterable[Record]) -> list[Record]:
    """Records in the order of how much they count: last those of the present code, of these what finished, and of that what has most
    metrics.
    """
    here = code_digest()
    return sorted(records, key=lambda record: (record.environment.code == here, record.status == "finished", len(record.metrics)))


def rows_of(records: Sequence[Record]) -> list[Row]:
    """Groups records that differ in the seed alone; training-free rows first, then by training and steps.

    Of two records with one seed the one counts that is later in `present_last`.

    Raises NotComparable if two records' metrics of one name have different identities.
    """
    refuse_mixed_identities(records)
    groups: dict[str, tuple[dict[str, Any], list[Record]]] = {}
    for record in present_last(records):
        options = all_options(record)
        key = json.dumps([record.method, options, settings_of(record.config)], sort_keys=True)
        groups.setdefault(key, (options, []))[1].append(record)
    rows = []
    for options, group in groups.values():
        by_seed = {record.config["seed"]: record for record in group}
        off = off_default(group[0].method, options)
        rows.append(Row(label(group[0], options), tuple(by_seed[seed] for seed in sorted(by_seed)), options, off))
    return sorted(rows, key=lambda row: (row.training, row.num_steps * (1 if row.training[0] else -1), row.label, row.records[0].run_id))


def refuse_mixed_identities(records: Sequence[Record]) -> None:
    """Raises NotComparable if two records' metrics of one name have different identities."""
    first: dict[str, Record] = {}
    for record in records:
        for name, metric in record.metrics.items():
            other = first.setdefault(name, record)
            theirs = other.metrics[name]
            if theirs.identity != metric.identity:
                keys = metric.identity.keys() | theirs.identity.keys()
                differing = sorted(k for k in keys if metric.identity.get(k) != theirs.identity.get(k))
                raise NotComparable(
                    f"{name} of {record.run_id} and of {other.run_id} are not comparable: they differ in {', '.join(differing)}; "
                    f"keep them below results folders of their own"
                )


def trains(record: Record) -> bool:
    """Whether a record's method is one that trains."""
    return record.method in METHODS.names() and bool(METHODS[record.method].sources)


def reference_record(rows: Sequence[Row]) -> Record | None:
    """The record of the teacher's own output, from which others' distance is measured, if it is there; that of most noise sets."""
    return reference_of_records([record for row in rows if not row.training[0] for record in row.finished])


def reference_of_records(records: Iterable[Record]) -> Record | None:
    """The same among the finished records of a task."""
    distances = [(record, record.metrics["distance_to_teacher"]) for record in records if "distance_to_teacher" in record.metrics]
    own = [record for record, distance in distances if distance.mean == 0]
    return max(own, key=lambda record: len(record.metrics["distance_to_teacher"].values), default=None)


def headline(rows: Sequence[Row]) -> str:
    """The metric by which a task's rows are compared."""
    metrics = next(record for row in rows for record in row.finished).metrics
    return next(name for name in HEADLINES if name in metrics)
