"""A finished run's student under another average of its weights."""

from __future__ import annotations

from pathlib import Path

from harness.files import header_of, write_sealed
from harness.runs.export import finished_run
from harness.training.power_average import average_of_width


def write_average(run: str, width: float, results: Path, out: Path | None = None) -> Path:
    """Writes a run's student under the power-function average of a width.

    Args:
        run: a run id in the results folder, or the folder of a run.
        out: the file; by default `student-ema-<width>.safetensors` in the run's folder.

    Returns:
        The file, which says how the student is sampled, as the run's own does.

    Raises UsageError for a run without a student or snapshots, and for an impossible width.
    """
    _, weights = finished_run(run, results)
    tensors = average_of_width(weights.parent / "averages", width)
    path = out or weights.parent / f"student-ema-{width:g}.safetensors"
    write_sealed(path, tensors, header_of(weights)[0])
    return path
