"""Rows that differ in one thing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from operator import xor
from typing import Any

from harness.methods import METHODS
from harness.records import Record
from harness.report.rows import Row
from harness.report.statistics import Difference, paired_difference
from harness.runs.identity import settings_of

CROWD = 30
"""Rows that differ in one thing, above which not all pairs are shown."""


@dataclass(frozen=True)
class Compared:
    """Two rows with their difference, which is None with fewer than two seeds in common."""

    first: Row
    second: Row
    difference: Difference | None

    @classmethod
    def of(cls, first: Row, second: Row, name: str) -> Compared:
        """Two rows compared in a metric."""
        return cls(first, second, paired_difference(first.finished, second.finished, name))


def comparable(rows: Sequence[Row]) -> list[Row]:
    """The trained rows with two seeds or more of which none diverged."""
    return [row for row in rows if row.training[0] and len(row.records) > 1 and not row.diverged]


def compared_neighbours(rows: Sequence[Row], name: str) -> tuple[list[Compared], int]:
    """Comparable rows that differ in one thing, and how many such pairs are left out."""
    pairs, left_out = neighbours(comparable(rows), name)
    found = [Compared.of(a, b, name) for a, b in pairs]
    return [pair for pair in found if pair.difference], left_out


def neighbours(rows: Sequence[Row], name: str) -> tuple[list[tuple[Row, Row]], int]:
    """Pairs of rows that differ in one thing, and how many such pairs are left out.

    The one thing is the method, an option off its default on this task, or a setting other than
    steps and training. Of more than `CROWD` rows that differ in the same thing, each is paired with
    the best alone. The compared numbers themselves choose the best, so the pairs left out belong to
    the family of tests too.

    Args:
        name: the metric that is compared.
    """
    sides = []
    for row in rows:
        record = row.records[0]
        side = {
            "method": record.method,
            **row.off_task,
            **settings_of(record.config),
            "rows": row.budget,
        }
        # An option at its default equals an option that a method lacks.
        sides.append(dict.fromkeys(_options_of(record), "") | side)
    groups = alike_but_one(sides, [side.keys() - {"rows"} for side in sides])
    found, left_out = set(), 0
    for members in groups.values():
        if len(members) <= CROWD:
            found |= set(combinations(members, 2))
            continue
        best = min(members, key=lambda number: rows[number].interval(name).mean)
        found |= {(min(best, other), max(best, other)) for other in members if other != best}
        left_out += math.comb(len(members) - 1, 2)
    return [(rows[a], rows[b]) for a, b in sorted(found)], left_out


def alike_but_one(
    sides: Sequence[Mapping[str, Any]], axes: Sequence[Iterable[str]]
) -> dict[tuple[str, int], list[int]]:
    """Groups of mappings that are equal in all but one name, by that name and a hash of the rest.

    Args:
        sides: the mappings; a value of "" counts as absent.
        axes: for each mapping, the names that may be the one.

    Returns:
        The places of each group's members.
    """
    first = {name: repr(value) for name, value in sides[0].items()} if sides else {}
    varying: set[str] = set()
    for side in sides:
        varying |= {
            name
            for name in first.keys() | side.keys()
            if first.get(name, "''") != repr(side.get(name, ""))
        }
    groups: dict[tuple[str, int], list[int]] = {}
    for place, (side, names) in enumerate(zip(sides, axes, strict=True)):
        marks = {
            name: hash((name, repr(side[name])))
            for name in varying & side.keys()
            if side[name] != ""
        }
        whole = reduce(xor, marks.values(), 0)
        for name in names:
            if name in varying:
                groups.setdefault((name, whole ^ marks.get(name, 0)), []).append(place)
    return groups


def _options_of(record: Record) -> list[str]:
    return (
        list(METHODS[record.method].Config.model_fields) if record.method in METHODS.names() else []
    )
