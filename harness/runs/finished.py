"""Finished runs in a results folder: a run's own record, and one of the same student."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from harness.errors import UsageError
from harness.files import inside, read_tensors
from harness.provenance import capture_environment
from harness.records import Record, read_record
from harness.runs.identity import refuse_other_run
from harness.runs.resolve import Resolved


def run_folder(resolved: Resolved, results: Path) -> Path:
    """The folder of a run in a results folder. Raises UsageError where a link leads out of it."""
    return inside(results / "runs" / resolved.run_id, results)


def finished_record(
    resolved: Resolved, results: Path, device: torch.device, any_code: bool = False
) -> Record | None:
    """A run's record if the run finished on this kind of device, or None.

    Args:
        any_code: whether a record of other code counts.
    """
    path = run_folder(resolved, results) / "record.json"
    if not path.exists():
        return None
    record = read_record(inside(path, results))
    if record.run_id != resolved.run_id:
        raise UsageError(
            f"{path} is the record of run {record.run_id}: delete it and the same command makes "
            "the run again"
        )
    here = capture_environment(device)
    same = record.environment.device == here.device and (
        any_code or record.environment.code == here.code
    )
    return record if record.status == "finished" and same else None


def student_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of the student in a run's folder.

    Raises UsageError if they are missing or damaged, or of another run.
    """
    path = folder / "student.safetensors"
    tensors = read_tensors(path)
    refuse_other_run(path, folder.name)
    return tensors


def sibling_of(resolved: Resolved, results: Path, device: torch.device) -> Record | None:
    """The finished run that trained the same student and evaluated it at other steps, or None."""
    if not resolved.shares_student:
        return None
    own = run_folder(resolved, results)
    for path in sorted(own.parent.glob(f"{resolved.method}-*/student.safetensors")):
        stated = inside(path.parent / "record.json", results)
        config = read_record(stated).config if stated.exists() else {}
        counts = {name: config.get(name, 0) for name in ("num_steps", "noise_sets")}
        there = replace(resolved, **counts)
        # The folder's name hashes the whole identity, so an equal name means an equal student.
        if run_folder(there, results) == path.parent != own:
            record = finished_record(there, results, device)
            if record is not None and not record.trained_in:
                return record
    return None
