"""Records that tests write by hand."""

from __future__ import annotations

from typing import Any

from harness.records import (
    Cost,
    Environment,
    LatencyEntry,
    Metric,
    Milestone,
    Record,
    TrainingBill,
)
from harness.report.tables import QUALITY, diversity

ENVIRONMENT = Environment(
    commit="0123456789abcdef",
    dirty=False,
    code="c",
    python="3.11",
    packages={"torch": "2.15.0"},
    device="cpu",
    cpu="a cpu",
    threads=2,
)
LATENCY = LatencyEntry(
    seconds=0.1,
    reference_seconds=0.4,
    ratio=0.25,
    reference="teacher, 24 steps",
    batch=16,
    dtype="float32",
    device="cpu",
    threads=2,
    warmup=2,
    repeats=9,
)
RARE = ("frechet_distance", "kl", "map_error", "fid_inception", "fid_clean", "fd_dinov2")
"""Metrics that a plain run on images lacks."""


def metric(name: str, values: dict[int, float], **identity: Any) -> Metric:
    return Metric(
        values=values, n=40, direction="lower", identity={"metric": name, "version": 1, **identity}
    )


def record(
    method: str = "ard",
    seed: int = 0,
    fid: float = 5.0,
    steps: int = 100,
    num_steps: int = 4,
    **changes: Any,
) -> Record:
    """A finished record; FID is `fid` and `fid + 1` on two noise sets."""
    identity = changes.pop("identity", {})
    names = [name for name in (*QUALITY, *diversity()) if name not in RARE]
    metrics = {name: metric(name, {0: 0.5, 1: 0.5}, **identity) for name in names}
    metrics |= {f"{name}_floor": metric(f"{name}_floor", {0: 0.25}) for name in names}
    metrics["fid"] = metric("fid", {0: fid, 1: fid + 1}, **identity)
    bill = TrainingBill(
        steps=steps,
        images=64 * steps,
        flops=2e12,
        trajectory_flops=3e12,
        teacher_evaluations=9,
        seconds=7.0,
        peak_memory_bytes=1,
        ema_initial_weight=0.0,
    )
    config = {
        "num_steps": num_steps,
        "seed": seed,
        "total_steps": steps,
        "batch_size": 64 if steps else 0,
        "micro_batch_size": None,
        "precision": "fp32",
        "compile": False,
        "noise_sets": 2,
        "init_from": None,
        "extra_features": "",
    }
    options = {"ard": {"history_layers": 6}, "teacher": {"solver": "ddim"}}.get(method, {})
    given = {
        "run_id": f"{method}-{num_steps}-{steps}-{seed}",
        "task": "tiny",
        "task_version": 1,
        "method": method,
        "options": options,
        "config": config,
        "target": "guided teacher",
        "hashes": {},
        "status": "finished",
        "metrics": metrics,
        "environment": ENVIRONMENT,
        "cost": Cost(
            parameters=2_500_000,
            nfe=float(num_steps),
            macs_per_sample=3_000_000,
            latency=LATENCY,
            training=bill if steps else None,
        ),
    }
    return Record(**{**given, **changes})


METHODS = ("ect", "imm", "ict", "lcm", "reflow", "shortcut")


def trained(method: str, fid: float, flops: float = 6.02e12, **changes: Any) -> Record:
    """A record with a bill and a curve that falls to its FID as a power of the images."""
    made = record(method, fid=fid, **{"steps": 100, **changes})
    assert made.cost is not None
    assert made.cost.training is not None
    bill = made.cost.training.model_copy(update={"flops": flops, "trajectory_flops": 1e12})
    whole = 64 * changes.get("steps", 100)
    points = [
        Milestone(step=1, images=whole // k, flops=1.0, quality={"fid": fid * k})
        for k in (8, 4, 2, 1)
    ]
    return made.model_copy(
        update={
            "cost": made.cost.model_copy(update={"training": bill}),
            "milestones": points,
            "options": {},
        }
    )


def field(fids: dict[str, float] | None = None, **changes: Any) -> list[Record]:
    fids = fids or {method: 2.0 + number for number, method in enumerate(METHODS)}
    return [trained(method, fid, **changes) for method, fid in fids.items()]
