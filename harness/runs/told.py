"""What a run tells its follower of itself: its settings, how it ends, and its row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.progress import Follower, Subject
from harness.records import Record
from harness.runs.identity import run_settings
from harness.runs.resolve import Resolved


def subject_of(resolved: Resolved, folder: Path, results: Path, code: str) -> Subject:
    """The run as a follower knows it.

    Args:
        code: the digest of the code that makes the run.
    """
    spec = resolved.task.spec
    config: dict[str, Any] = {
        "task": spec.name,
        "task_version": spec.version,
        "method": resolved.method,
        **run_settings(resolved),
        "options": resolved.config.model_dump(mode="json"),
    }
    return Subject(resolved.run_id, code[:8], folder, results, config)


@contextmanager
def followed(follower: Follower, subject: Subject) -> Iterator[None]:
    """Inside, a follower is told of a run, and then how it ended."""
    follower.begin(subject)
    try:
        yield
    except BaseException:
        follower.end(False)
        raise
    follower.end(True)


def row_of(record: Record) -> dict[str, float]:
    """The numbers of a finished record: means of metrics, and what sampling and training cost."""
    row = {name: metric.mean for name, metric in record.metrics.items()}
    if (cost := record.cost) is None:
        return row
    row |= {"nfe": cost.nfe, "macs_per_sample": cost.macs_per_sample, "parameters": cost.parameters}
    if cost.latency:
        row |= {
            "latency_seconds": cost.latency.seconds,
            "latency_ratio": cost.latency.ratio,
        }
    if bill := cost.training:
        row |= {"training_flops": bill.whole_flops, "training_seconds": bill.seconds}
        row |= {} if bill.mfu is None else {"mfu": bill.mfu}
    return row
