"""Time by stage and memory of the default run with cold caches.

The default run is `harness run --method ard --history-layers 6`.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from benchmarks.device.rows import Rows, Setting, Values
from harness.progress import Progress
from harness.runs.config import parse_config
from harness.runs.resolve import resolve
from harness.runs.run import run
from harness.tasks import load_task
from harness.training.tiny_task import tiny_task


def rows(setting: Setting) -> Rows:
    """One row."""
    yield "harness run", lambda: default_run(setting)


class Stages:
    """A report that notes when each stage starts."""

    def __init__(self) -> None:
        self.starts: list[tuple[str, float]] = []

    def __call__(self, stage: str) -> Progress:
        self.starts.append((stage, time.perf_counter()))
        return lambda done, total: None

    def seconds(self) -> dict[str, float]:
        """Seconds from the start of each stage to that of the next one."""
        found: dict[str, float] = {}
        ends = [start for _, start in self.starts[1:]] + [time.perf_counter()]
        for (stage, start), end in zip(self.starts, ends, strict=True):
            found[stage] = round(found.get(stage, 0.0) + end - start, 2)
        return found


def default_run(setting: Setting) -> Values:
    """Runs it and its reference in a new results folder."""
    stages, started = Stages(), time.perf_counter()
    stages("start")
    with tempfile.TemporaryDirectory() as folder:
        task, layers = (
            (tiny_task(Path(folder) / "task"), 2) if setting.toy else (load_task("digits"), 6)
        )
        config = parse_config({"method": "ard", "options": {"history_layers": layers}})
        resolved = resolve(config, task, device=setting.device)
        record, _ = run(resolved, Path(folder), setting.device, stages)
    seconds = time.perf_counter() - started
    assert record.cost is not None
    assert record.cost.training is not None
    assert record.cost.latency is not None
    bill, latency = record.cost.training, record.cost.latency
    return {
        "total_seconds": round(seconds, 1),
        "stages": stages.seconds(),
        "training_steps": bill.steps,
        "training_seconds": round(bill.seconds, 2),
        "training_memory_bytes": bill.peak_memory_bytes,
        "memory_bytes": torch.cuda.max_memory_allocated(setting.device)
        if setting.device.type == "cuda"
        else 0,
        "latency_seconds": latency.seconds,
        "latency_of_reference": latency.reference_seconds,
        "metrics": {name: round(metric.mean, 4) for name, metric in record.metrics.items()},
    }
