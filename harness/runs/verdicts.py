"""The record of an outside judge's verdicts, from GenEval's result lines."""

from __future__ import annotations

from pathlib import Path

import torch

from harness.data.geneval import read_results
from harness.errors import UsageError
from harness.files import file_hash
from harness.metrics.elsewhere import judged_metrics
from harness.records import Record
from harness.runs.external import Outside, outside_record, written_record
from harness.tasks import Task


def evaluate_results(
    path: Path, judge: str, outside: Outside, task: Task, results: Path, device: torch.device
) -> Record:
    """The record of result lines, which hold shares of followed prompts alone.

    Args:
        judge: the name of who judged.

    Raises UsageError for a task without prompts and for lines that cannot be read.
    """
    if task.spec.prompts is None:
        raise UsageError(
            f"task {task.spec.name} has no prompts to follow: give one that has, as scenes"
        )
    metrics = judged_metrics(task, read_results(path), judge)
    hashes = {"conditions": task.conditions_hash, "evaluated": file_hash(path)}
    record = outside_record(task, outside, hashes, 1, metrics, device)
    return written_record(record, results)
