"""Time by stage and memory of the default run with cold caches, and the same run on ranks.

The default run is `harness run --method ard --history-layers 6`. Ranks are torchrun's, one for each
GPU, with whole networks and with sharded ones.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.device.rows import Rows, Setting, Values
from harness.progress import Progress
from harness.records import read_record
from harness.runs.config import parse_config
from harness.runs.resolve import resolve
from harness.runs.run import run
from harness.tasks import load_task
from harness.training.tiny_task import tiny_task

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
RANKS_LIMIT = 1e-3
"""Largest relative difference between ranks and one process."""


def rows(setting: Setting) -> Rows:
    """The default run, and a short one alone, on ranks, and on ranks that share each network."""
    yield "harness run", lambda: default_run(setting)
    if setting.toy:  # tests/runs/test_ranks.py has ranks on a CPU
        return
    plain: Values = {}

    def alone() -> Values:
        plain.update(short_run(setting, [sys.executable]))
        return dict(plain)

    yield "a short run", alone
    for name, more in (("ranks", []), ("sharded ranks", ["--shard"])):
        yield f"the same on {name}", lambda more=more: on_ranks(setting, plain, more)  # type: ignore[misc]


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


def short_run(setting: Setting, before: Sequence[str], more: Sequence[str] = ()) -> Values:
    """FID, first loss and seconds of 20 steps of ARD, run by the command line."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *before, "-m", "harness", "run", "--method", "ard", "--history-layers", "6",
            "--budget", "steps=20", "--noise-sets", "1", "--device", setting.device.type,
            "--results", folder, *more,
        ]  # fmt: skip
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-400:]}")
        seconds = time.perf_counter() - started
        (record,) = (read_record(path) for path in Path(folder).glob("runs/ard*/record.json"))
    return {
        "fid": record.metrics["fid"].mean,
        "first_loss": record.first_losses["loss"],
        "ranks": record.environment.ranks,
        "seconds": round(seconds, 1),
    }


def on_ranks(setting: Setting, plain: Values, more: Sequence[str]) -> Values:
    """The same on a rank for each GPU, and how far it is from one process."""
    ranks = torch.cuda.device_count()
    found = short_run(setting, [*TORCHRUN, f"--nproc-per-node={ranks}"], more)
    apart = {f"{name}_apart": abs(found[name] / plain[name] - 1) for name in ("fid", "first_loss")}
    return found | apart | {"limits": dict.fromkeys(apart, RANKS_LIMIT)}
