"""Records whose numbers do not compare with a table's: what tells them apart, and their section."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from harness.metrics import METRICS
from harness.records import Record
from harness.report.labels import label
from harness.report.statistics import number
from harness.runs.external import from_outside, stated_bill

SHORT = 30
"""Letters of a value that a reason shows; longer ones are hashes and such."""


@dataclass
class _Kind:
    """One identity of a metric, and the records that have it."""

    identity: dict[str, Any]
    votes: list[tuple[bool, int]] = field(default_factory=list)

    @property
    def weight(self) -> tuple[int, int, int]:
        """Records of ours, then all; of equally many, the kind that was seen last."""
        return sum(ours for ours, _ in self.votes), len(self.votes), self.votes[-1][1]


@dataclass(frozen=True)
class Apart:
    """A record that shares no column with the others, and why."""

    record: Record
    reason: str


def told_apart(records: Sequence[Record]) -> tuple[list[Record], list[Apart]]:
    """A task's records that compare with each other, and those that do not.

    For each metric the identity of most records counts, and runs of ours go before work from
    elsewhere. A record with another identity in any metric stands apart.

    Args:
        records: those that count most come last.
    """
    kinds: dict[str, list[_Kind]] = {}
    for place, record in enumerate(records):
        for name, metric in record.metrics.items():
            known = kinds.setdefault(name, [])
            kind = next((k for k in known if k.identity == metric.identity), None)
            if kind is None:
                kind = _Kind(metric.identity)
                known.append(kind)
            kind.votes.append((not from_outside(record), place))
    common = {
        name: max(known, key=lambda kind: kind.weight).identity for name, known in kinds.items()
    }
    together, apart = [], []
    for record in records:
        reason = _reason(record, common)
        if reason:
            apart.append(Apart(record, reason))
        else:
            together.append(record)
    return together, apart


def _reason(record: Record, common: dict[str, dict[str, Any]]) -> str:
    """What tells a record's metrics from those of a table, or "" if nothing does."""
    judges = {m.identity["judge"] for m in record.metrics.values() if "judge" in m.identity}
    if judges:  # its shares are all that is known
        return f"judged by {', '.join(sorted(judges))}"
    found: dict[str, tuple[Any, Any]] = {}
    for name, metric in record.metrics.items():
        mine, theirs = metric.identity, common[name]
        if mine != theirs:
            keys = sorted(mine.keys() | theirs.keys())
            found |= {
                key: (mine.get(key), theirs.get(key))
                for key in keys
                if mine.get(key) != theirs.get(key)
            }
    return "; ".join(
        f"{key} {mine} instead of {theirs}"
        if max(len(str(mine)), len(str(theirs))) <= SHORT
        else f"another {key}"
        for key, (mine, theirs) in sorted(found.items())
    )


def apart_table(found: Sequence[Apart]) -> pd.DataFrame:
    """A line for each record: its numbers, its own N, its bill as stated, and the reason."""
    lines = []
    for each in found:
        record = each.record
        measured = {
            name: record.metrics[name] for name in METRICS.names() if name in record.metrics
        }
        line = {
            "method": label(record),
            "steps": str(record.config["num_steps"]),
            "training": training_of(record),
            "N": f"{max((metric.n for metric in measured.values()), default=0):,}",
        }
        for name, metric in measured.items():
            line[METRICS[name].heading] = number(metric.mean, f".{METRICS[name].digits}f")
        lines.append({**line, "differs in": each.reason})
    table = pd.DataFrame(lines).fillna("")
    last = "differs in"
    return table[[*(name for name in table.columns if name != last), last]] if lines else table


def training_of(record: Record) -> str:
    """Training steps and batch size, or the bill of work from elsewhere as its author states it."""
    if bill := stated_bill(record):
        return f"as stated: {bill}"
    steps, batch = record.config["total_steps"], record.config["batch_size"]
    return f"{steps} × {batch}" if steps else "none"
