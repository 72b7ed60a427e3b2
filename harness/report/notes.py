"""What a reader of a task's tables must know, a sentence each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from harness.metrics.caveats import floor_of_other_size
from harness.records import LatencyEntry, Record
from harness.report.labels import counted, defaults_of, options_text
from harness.report.rows import ABSURD, Row, is_trial
from harness.report.statistics import number
from harness.report.tables import plain_heading


def notes(rows: Sequence[Row], name: str) -> list[str]:
    """The notes of rows of which at least one finished.

    Args:
        name: the headline metric.
    """
    finished = [row for row in rows if row.finished]
    records = [record for row in finished for record in row.finished]
    return [
        *_of_numbers(records[0], name),
        *_of_intervals(finished),
        *_of_cost(records, finished),
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
    if "kid_floor" in first.metrics:
        floor = number(first.metrics["kid_floor"].mean, ".0f")
        found.append(
            "KID uses features that are not normalised, so its size means nothing: "
            f"held-out real images have {floor}."
        )
    return found


def _of_intervals(rows: Sequence[Row]) -> list[str]:
    found = [
        "± is the 95 % t interval over training seeds crossed with evaluation noise sets, both as "
        "random factors (Satterthwaite's degrees of freedom). "
        "A row without training has noise sets alone.",
        "Seeds differ in batch order, initial weights and training noise; they share noise sets.",
    ]
    if any(len(row.records) > 1 and row.records[0].config["noise_sets"] == 1 for row in rows):
        found.append("Where a row has one noise set, ± covers training seeds only.")
    if any(row.training[0] and len(row.records) == 1 for row in rows):
        found.append("A trained row of one seed has no ±: one seed says nothing of another.")
    if all(is_trial(record) for row in rows for record in row.records):
        found.append("These runs are a search's trials: they chose options and enter no table.")
    return found


def _of_cost(records: Sequence[Record], rows: Sequence[Row]) -> list[str]:
    latencies = [record.cost.latency for record in records if record.cost and record.cost.latency]
    return [
        *dict.fromkeys(map(_protocol, latencies)),
        *_of_stores(rows),
        "Training seconds are wall-clock seconds on the machine named below; "
        "whether it was idle is not recorded.",
    ]


def _of_stores(rows: Sequence[Row]) -> list[str]:
    """The stores of trajectories that rows share, told apart by their FLOPs."""
    bills = [cost.training for row in rows if (cost := row.finished[0].cost) and cost.training]
    stores = Counter(bill.trajectory_flops for bill in bills if bill.trajectory_flops)
    return [
        f"{counted(count, 'row')} share one store of trajectories, "
        f"made once for {flops / 1e12:.3g} TFLOPs; each is charged the whole of it."
        for flops, count in sorted(stores.items())
        if count > 1
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
    found, methods = [], {row.records[0].method for row in rows}
    tuned = [
        f"{method} {options_text(options)}"
        for method, options in sorted(defaults_of(rows[0].records[0].task).items())
        if method in methods
    ]
    if tuned:
        found.append(
            "A name shows what differs from the task's own defaults. Where these are not the "
            f"method's, they are: {'; '.join(tuned)}."
        )
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
    ] + _of_diverged(rows)


def _of_diverged(rows: Sequence[Row]) -> list[str]:
    """How divergence is called, and the rows that have it."""
    found = [
        f"{row.label}, {counted(row.num_steps)}" for row in rows if row.finished and row.diverged
    ]
    if not found:
        return []
    return [
        f"A seed diverged if it failed, or if its headline metric is not finite or over {ABSURD} "
        "times both its row's best seed and the teacher's. "
        f"Such a row has no ± and is in no comparison and no plot: {'; '.join(found)}."
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
