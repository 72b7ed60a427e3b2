"""Rows to tables of text."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from harness.metrics import METRICS
from harness.records import Record
from harness.report.rows import Row, counted, headline, neighbours, reference_record, trains
from harness.report.statistics import Difference, degradation_ratio, holm, metric_interval, paired_difference, t_interval

ELSEWHERE = {  # metrics that need more than samples: (heading, digits)
    "fid_inception": ("FID, Inception ↓", 2),
    "fid_clean": ("FID, clean-fid's protocol ↓", 2),
    "fd_dinov2": ("FD-DINOv2 ↓", 1),
    "frechet_distance": ("Frechet distance ↓", 4),
    "kl": ("KL ↓", 3),
    "map_error": ("error of the ODE map ↓", 4),
    "distance_to_teacher": ("distance to teacher ↓", 3),
}
QUALITY = {name: (METRICS[name].heading, METRICS[name].digits) for name in ("fid", "kid", "label_agreement")} | ELSEWHERE


def diversity() -> dict[str, tuple[str, int]]:
    """Heading and digits of every other registered metric, plug-ins' last."""
    first = ("precision", "recall", "density", "coverage", "inception_style_score", "class_diversity", "memorised_share")
    names = [*first, *(name for name in METRICS.names() if name not in first and name not in QUALITY)]
    return {name: (METRICS[name].heading, METRICS[name].digits) for name in names}


KEYS = ["method", "steps", "training", "seeds × noise sets"]


def results_table(rows: Sequence[Row]) -> pd.DataFrame:
    """One line a row: quality with 95 % t intervals, and cost. All cells are text."""
    return pd.DataFrame([_line(row) for row in rows]).fillna("")


def _line(row: Row) -> dict[str, str]:
    steps, batch = row.training
    line = {
        "method": row.shown,
        "steps": str(row.num_steps),
        "training": f"{steps} × {batch}" if steps else "none" if not trains(row.records[0]) else "untrained",
        "seeds × noise sets": f"{len(row.finished) if steps else '-'} × {row.records[0].config['noise_sets']}",
    }
    if not row.finished:
        return {**line, "status": f"failed: {row.records[0].reason}"}
    for name, (heading, digits) in {**QUALITY, **diversity()}.items():
        if all(name in record.metrics for record in row.finished):
            line[heading] = metric_interval(row.finished, name).text(digits)
    costs = [record.cost for record in row.finished if record.cost]
    if costs:
        line["NFE"] = f"{costs[0].nfe:g}"
        line["MMACs / sample"] = f"{costs[0].macs_per_sample / 1e6:.1f}"
        line["parameters"] = f"{costs[0].parameters / 1e6:.3f} M"
    ratios = [cost.latency.ratio for cost in costs if cost.latency]
    line["latency / teacher"] = f"{t_interval(ratios).mean:.3f}" if ratios else ""
    bills = [cost.training for cost in costs if cost.training]
    if bills:
        line["training TFLOPs + trajectories"] = f"{bills[0].student_flops / 1e12:.1f} + {bills[0].trajectory_flops / 1e12:.1f}"
        line["training seconds"] = f"{t_interval([bill.seconds + bill.inherited_seconds for bill in bills]).mean:.0f}"
    return line


def floor_table(rows: Sequence[Row]) -> pd.DataFrame:
    """The held-out real images against the same reference, at their own N: a table apart, because FID depends on N."""
    metrics = {name: metric for row in rows for record in row.finished for name, metric in record.metrics.items()}
    floors = [metric.n for name, metric in metrics.items() if name.endswith("_floor")]
    line = {"held-out real samples": f"N = {floors[0]}"}
    for name, (heading, digits) in {**QUALITY, **diversity()}.items():
        if f"{name}_floor" in metrics:
            line[heading] = f"{metrics[f'{name}_floor'].mean:.{digits}f}"
    return pd.DataFrame([line])


def exposure_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Error after the last step on the teacher's history and on the student's own, and their gap after each step."""
    lines = []
    for row in rows:
        exposures = [record.exposure for record in row.finished if record.exposure]
        if not exposures or not row.training[0]:
            continue
        gaps = [[own - taught for own, taught in zip(e.on_own_history, e.on_teachers_history, strict=True)] for e in exposures]
        lines.append({
            **{key: value for key, value in _line(row).items() if key in KEYS[:3]},
            "last step, teacher's history": t_interval([e.on_teachers_history[-1] for e in exposures]).text(4),
            "last step, own history": t_interval([e.on_own_history[-1] for e in exposures]).text(4),
            "gap after each step": ", ".join(f"{sum(step) / len(step):.4f}" for step in zip(*gaps, strict=True)),
        })  # fmt: skip
    return pd.DataFrame(lines)


def error_split_table(rows: Sequence[Row]) -> pd.DataFrame:
    """What a row's error of the ODE map is made of, where the exact map is known: root mean squares, which do not add up."""
    lines = []
    for row in rows:
        if not row.finished or "map_error" not in row.finished[0].metrics:
            continue
        exposures = [record.exposure for record in row.finished if record.exposure and record.exposure.drift]
        line = {
            **{key: value for key, value in _line(row).items() if key in KEYS[:3]},
            "whole": metric_interval(row.finished, "map_error").text(4),
            "solver: the teacher's trajectories": metric_interval(row.finished, "solver_error").text(4),
        }
        if exposures:
            line["approximation: on the teacher's history"] = t_interval([e.on_teachers_history[-1] for e in exposures]).text(4)
            line["exposure: from there to its own history"] = t_interval([e.drift[-1] for e in exposures]).text(4)
        lines.append(line)
    return pd.DataFrame(lines).fillna("")


def differences_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Pairs of trained rows of two finished seeds or more that differ in one thing (a method or an option), paired within seed and noise
    set. Holm's correction is over the pairs of one number of steps and one training, so that rows at another budget change nothing;
    of a crowd (see `neighbours`) it is over all its pairs.
    """
    trained = [row for row in rows if row.training[0] and len(row.finished) > 1]
    if not trained:
        return pd.DataFrame()
    name = headline(rows)
    pairs: list[tuple[Row, Row, Difference]] = []
    found, left_out = neighbours(trained, name)
    for a, b in found:
        difference = paired_difference(a.finished, b.finished, name)
        if difference:
            pairs.append((a, b, difference))
    heading, digits = QUALITY[name]
    heading = heading.rstrip(" ↓↑") + " first − second"
    reference = reference_record(rows)
    families: dict[tuple[int, ...], list[int]] = {}
    for place, (a, _, _) in enumerate(pairs):
        families.setdefault(a.budget, []).append(place)
    significant: dict[int, bool] = {}
    for budget, places in families.items():
        shown = holm([pairs[place][2].p_value for place in places], unseen=left_out[budget])
        significant |= dict(zip(places, shown, strict=True))
    lines = []
    for place, (a, b, difference) in enumerate(pairs):
        lower = a.label if difference.interval.mean < 0 else b.label
        ratio = degradation_ratio(a.finished, b.finished, reference, name) if reference else None
        lines.append({
            "first": a.label, "second": b.label, "steps": str(a.num_steps), "training": f"{a.training[0]} × {a.training[1]}",
            "seeds": str(difference.seeds), heading: difference.interval.text(digits), "p": f"{difference.p_value:.3g}",
            "better (Holm, 95 %)": lower if significant[place] else "not shown",
            "over the teacher's, first / second": ratio.text(3) if ratio else "",
        })  # fmt: skip
    return pd.DataFrame(lines)


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader of the table must know: N, the floor, target, flags, latency protocol, environments."""
    records = [record for row in rows for record in row.finished]
    if not records:
        return []
    first = records[0]
    said = ["Training is optimizer steps × batch size."]
    main = headline(rows)
    heading = QUALITY[main][0].rstrip(" ↓↑")
    said += [f"N = {first.metrics[main].n} generated samples in each noise set; {heading} depends on N."]
    if "kl" in first.metrics:
        said.append(f"KL by change of variables on the first {first.metrics['kl'].n} samples; not known for a stochastic sampler.")
    said.append("± is the 95 % t interval over training seeds, or over evaluation noise sets for a row without training.")
    said.append("Seeds differ in batch order, initial weights and training noise; trajectories and evaluation noise are the same for all.")
    if "kid_floor" in first.metrics:
        floor = f"{first.metrics['kid_floor'].mean:.0f}"
        said.append(f"KID is on features as they are, not normalised: held-out real images have {floor}, so that size says nothing.")
    latencies = [record.cost.latency for record in records if record.cost and record.cost.latency]
    if latencies:
        protocols = {
            entry.model_copy(update={"seconds": 0, "reference_seconds": 0, "ratio": 0}).model_dump_json(): entry for entry in latencies
        }
        said.extend(
            f"Latency: batch {entry.batch}, {entry.dtype}, {entry.device} with {entry.threads} threads, {entry.warmup} warm-ups, "
            f"median of {entry.repeats} repeats interleaved with the reference ({entry.reference})."
            for entry in protocols.values()
        )
    said.append("Trajectory FLOPs are those of the whole store, charged in full to each run.")
    said += [f"Quality along training is of the first {n} samples of noise set 0." for n in sorted(_curves_of(records))]
    random = sorted({row.label for row in rows if row.finished and row.records[0].init == "random" and row.training[0]})
    if random:
        said.append(f"Students start from random weights in: {'; '.join(random)}.")
    shared = sorted({row.label for row in rows if any(record.trained_in for record in row.records)})
    if shared:
        said.append(f"One student was trained for all numbers of steps, and its bill stands in each of its rows, in: {'; '.join(shared)}.")
    targets = sorted({f"{row.label}: {row.records[0].target}" for row in rows if row.records[0].target != "guided teacher"})
    said.extend(f"Target is not the guided teacher in {target}." for target in targets)
    said.extend(sorted({f"{record.run_id}: {flag}." for record in records for flag in record.flags}))
    said.extend(
        f"Failed, and in no comparison: {row.label}, {counted(row.num_steps)} ({row.records[0].reason})."
        for row in rows
        if not row.finished
    )
    machines = {
        (e.device, e.cpu, e.python, e.packages.get("torch"), e.commit[:10] if e.commit else "no commit", e.code, e.dirty)
        for e in (record.environment for record in records)
    }
    for device, cpu, python, torch, commit, code, dirty in sorted(machines, key=str):
        state = " with uncommitted changes" if dirty else ""
        said.append(f"Made on {device} ({cpu}), Python {python}, torch {torch}, commit {commit}{state}, code {code}.")
    return said


def _curves_of(records: Sequence[Record]) -> set[int]:
    """On how many samples curves are, where not on all."""
    return {point.n for record in records for point in record.milestones if point.n is not None}
