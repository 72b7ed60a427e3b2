"""What a reader of a task's tables must know, a sentence each."""

from __future__ import annotations

from collections.abc import Sequence

from harness.metrics.caveats import floor_of_other_size
from harness.records import LatencyEntry, Record
from harness.report.labels import counted
from harness.report.rows import Row
from harness.report.tables import plain_heading


def notes(rows: Sequence[Row], name: str) -> list[str]:
    """The notes of rows of which at least one finished.

    Args:
        name: the headline metric.
    """
    records = [record for row in rows for record in row.finished]
    return [
        *_of_numbers(records[0], name),
        *_of_cost(records),
        *_of_curves(records),
        *_of_rows(rows),
        *sorted({f"{record.run_id}: {flag}." for record in records for flag in record.flags}),
        *_of_failures(rows),
        *_of_machines(records),
    ]


def _of_numbers(first: Record, name: str) -> list[str]:
    found = [
        "Training is optimizer steps × batch size.",
        f"N = {first.metrics[name].n} generated samples in each noise set; "
        f"{plain_heading(name)} depends on N.",
    ]
    if caveat := floor_of_other_size(first.metrics, name):
        found.append(caveat)
    if "kl" in first.metrics:
        found.append(
            f"KL is by change of variables on the first {first.metrics['kl'].n} samples; "
            "a stochastic sampler has none."
        )
    found.append(
        "± is the 95 % t interval over training seeds, "
        "or over evaluation noise sets for a row without training."
    )
    found.append(
        "Seeds differ in batch order, initial weights and training noise; "
        "they share trajectories and evaluation noise."
    )
    if "kid_floor" in first.metrics:
        floor = f"{first.metrics['kid_floor'].mean:.0f}"
        found.append(
            "KID uses features that are not normalised, so its size means nothing: "
            f"held-out real images have {floor}."
        )
    return found


def _of_cost(records: Sequence[Record]) -> list[str]:
    latencies = [record.cost.latency for record in records if record.cost and record.cost.latency]
    return [
        *dict.fromkeys(map(_protocol, latencies)),
        "Each run is charged the trajectory FLOPs of the whole store.",
    ]


def _protocol(entry: LatencyEntry) -> str:
    return (
        f"Latency: batch {entry.batch}, {entry.dtype}, "
        f"{entry.device} with {counted(entry.threads, 'thread')}, {entry.warmup} warm-ups, "
        f"median of {entry.repeats} repeats interleaved with the reference ({entry.reference})."
    )


def _of_curves(records: Sequence[Record]) -> list[str]:
    sizes = {point.n for record in records for point in record.milestones if point.n is not None}
    return [
        f"Quality along training is measured on the first {n} samples of noise set 0."
        for n in sorted(sizes)
    ]


def _of_rows(rows: Sequence[Row]) -> list[str]:
    found = []
    random = sorted(
        {
            row.label
            for row in rows
            if row.finished and row.records[0].init == "random" and row.training[0]
        }
    )
    if random:
        found.append(f"Students start from random weights in: {'; '.join(random)}.")
    shared = sorted({row.label for row in rows if any(record.trained_in for record in row.records)})
    if shared:
        found.append(
            "One student serves all numbers of steps, "
            f"and each of its rows shows its whole bill, in: {'; '.join(shared)}."
        )
    targets = sorted(
        {
            f"{row.label}: {row.records[0].target}"
            for row in rows
            if row.records[0].target != "guided teacher"
        }
    )
    return [*found, *(f"The target is not the guided teacher in {target}." for target in targets)]


def _of_failures(rows: Sequence[Row]) -> list[str]:
    return [
        "Failed, and in no comparison: "
        f"{row.label}, {counted(row.num_steps)} ({row.records[0].reason})."
        for row in rows
        if not row.finished
    ]


def _of_machines(records: Sequence[Record]) -> list[str]:
    machines = {
        (
            e.device,
            e.cpu,
            e.python,
            e.packages.get("torch"),
            e.commit[:10] if e.commit else "no commit",
            e.code,
            e.dirty,
        )
        for e in (record.environment for record in records)
    }
    return [
        f"Made on {device} ({cpu}), Python {python}, torch {torch}, commit {commit}"
        f"{' with uncommitted changes' if dirty else ''}, code {code}."
        for device, cpu, python, torch, commit, code, dirty in sorted(machines, key=str)
    ]
