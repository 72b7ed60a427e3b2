"""Records to tables: one row for each method and setting, its seeds together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from itertools import combinations
from operator import xor
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from harness.config import PLAIN_CONFIG, all_options, settings
from harness.errors import NotComparable, UsageError
from harness.methods import METHODS
from harness.metrics import METRICS
from harness.records import Record, read_record
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


HEADLINES = ("fid", "frechet_distance")
"""The metric of differences and curves: the first that a task has."""
DIVERSITY = {
    "precision": ("precision ↑", 3),
    "recall": ("recall ↑", 3),
    "density": ("density ↑", 3),
    "coverage": ("coverage ↑", 3),
    "inception_style_score": ("inception-style score ↑", 2),
    "class_diversity": ("diversity in a class (real = 1)", 3),
    "memorised_share": ("memorised ↓", 4),
}
CROWD = 30
"""Rows that differ in one thing, above which not all pairs are shown."""
KEYS = ["method", "steps", "training", "seeds × noise sets"]


@dataclass(frozen=True)
class Row:
    """The records of one method and setting, by seed."""

    label: str
    records: tuple[Record, ...]
    options: Mapping[str, Any]
    """As `all_options` gives them."""
    off_default: Mapping[str, Any]
    """Those that differ from their method's defaults."""

    @property
    def finished(self) -> tuple[Record, ...]:
        return tuple(record for record in self.records if record.status == "finished")

    @property
    def num_steps(self) -> int:
        return self.records[0].config["num_steps"]

    @property
    def training(self) -> tuple[int, int]:
        """Training steps and batch size; (0, 0) without training."""
        return self.records[0].config["total_steps"], self.records[0].config["batch_size"]


def load_records(results: Path) -> list[Record]:
    """All records below a results folder, those of `runs/` and the committed ones; of one run id the former counts.

    Raises UsageError if there is none.
    """
    paths = [*results.glob("*/records/*.json"), *results.glob("records/*.json"), *results.glob("runs/*/record.json")]
    found = {record.run_id: record for record in map(read_record, sorted(paths, key=lambda p: p.name == "record.json"))}
    if not found:
        raise UsageError(f"there is no record below {results}; `harness run` makes one")
    return list(found.values())


def counted(number: int, what: str = "step") -> str:
    """Such as "1 step" or "4 steps"."""
    return f"{number} {what}{'s' if number != 1 else ''}"


def label(record: Record, options: Mapping[str, Any] | None = None) -> str:
    """Method and the options that matter: those marked for labels and those that differ from the default.

    Args:
        options: what `all_options` gives for the record, where it is known.
    """
    options, config = all_options(record) if options is None else options, settings(record)
    off = off_default(record.method, options)
    if record.method in METHODS.names():
        fields = METHODS[record.method].Config.model_fields
        told = [name for name in options if name in fields and in_label(fields[name])]
        off = {name: options[name] for name in told} | off
    off |= {name: config[name] for name, plain in PLAIN_CONFIG.items() if config[name] != plain}
    return record.method + "".join(f", {name} {_shown(value)}" for name, value in off.items())


def off_default(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that differ from their method's defaults."""
    plain = _plain(METHODS[method].Config) if method in METHODS.names() else {}
    return {name: value for name, value in options.items() if name not in plain or value != plain[name]}


@cache
def _plain(config: type[BaseModel]) -> dict[str, Any]:
    return config().model_dump(mode="json")


def _shown(value: Any) -> str:
    """A list as it is typed, a long number with four digits."""
    if isinstance(value, float) and len(str(value)) > len("0.00054"):
        return f"{value:.4g}"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def neighbours(rows: Sequence[Row], name: str) -> list[tuple[Row, Row]]:
    """Pairs of rows that differ in one thing: the method, an option off its default, or a setting other than steps and training.

    Of more than `CROWD` rows that differ in the same thing each is paired with the best alone.
    """
    sides = []
    for row in rows:
        record = row.records[0]
        side = {"method": record.method, **row.off_default, **settings(record), "rows": (row.num_steps, row.training)}
        sides.append(dict.fromkeys(_options_of(record), "") | side)  # what is at its default says nothing to another method
    buckets = alike_but_one(sides, [side.keys() - {"rows"} for side in sides])
    found = set()
    for members in buckets.values():
        if len(members) > CROWD:
            best = min(members, key=lambda number: metric_interval(rows[number].finished, name).mean)
            found |= {(min(best, number), max(best, number)) for number in members if number != best}
        else:
            found |= set(combinations(members, 2))
    return [(rows[a], rows[b]) for a, b in sorted(found)]


def alike_but_one(sides: Sequence[Mapping[str, Any]], axes: Sequence[Iterable[str]]) -> dict[tuple[str, int], list[int]]:
    """Groups (by their places) of what is equal in all but one thing; a value of "" counts as nothing.

    Args:
        sides: name: value of each.
        axes: the names that may be that one thing, for each.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    for place, (side, names) in enumerate(zip(sides, axes, strict=True)):
        marks = {name: 0 if value == "" else hash((name, repr(value))) for name, value in side.items()}
        whole = reduce(xor, marks.values(), 0)
        for name in names:
            groups.setdefault((name, whole ^ marks[name]), []).append(place)
    return groups


def _options_of(record: Record) -> list[str]:
    return list(METHODS[record.method].Config.model_fields) if record.method in METHODS.names() else []


def in_label(option: FieldInfo) -> bool:
    """Whether every table names an option."""
    return isinstance(option.json_schema_extra, dict) and bool(option.json_schema_extra.get("in_label"))


def rows_of(records: Sequence[Record]) -> list[Row]:
    """Groups records that differ in the seed alone; training-free rows first, then by training and steps.

    Of two records with one seed the one with more metrics counts.

    Raises NotComparable if two records' metrics of one name have different identities.
    """
    refuse_mixed_identities(records)
    groups: dict[str, tuple[dict[str, Any], list[Record]]] = {}
    for record in records:
        options = all_options(record)
        key = json.dumps([record.method, options, settings(record)], sort_keys=True)
        groups.setdefault(key, (options, []))[1].append(record)
    rows = []
    for options, group in groups.values():
        by_seed = {record.config["seed"]: record for record in sorted(group, key=lambda r: (r.status == "finished", len(r.metrics)))}
        off = off_default(group[0].method, options)
        rows.append(Row(label(group[0], options), tuple(by_seed[seed] for seed in sorted(by_seed)), options, off))
    return sorted(rows, key=lambda row: (row.training, -row.num_steps if not row.training[0] else row.num_steps, row.label))


def refuse_mixed_identities(records: Sequence[Record]) -> None:
    """Raises NotComparable if two records' metrics of one name have different identities."""
    first: dict[str, Record] = {}
    for record in records:
        for name, metric in record.metrics.items():
            other = first.setdefault(name, record)
            theirs = other.metrics[name]
            if theirs.identity != metric.identity:
                keys = metric.identity.keys() | theirs.identity.keys()
                differing = sorted(k for k in keys if metric.identity.get(k) != theirs.identity.get(k))
                raise NotComparable(
                    f"{name} of {record.run_id} and of {other.run_id} are not comparable: they differ in {', '.join(differing)}"
                )


def trains(record: Record) -> bool:
    """Whether a record's method is one that trains."""
    return record.method in METHODS.names() and bool(METHODS[record.method].sources)


def results_table(rows: Sequence[Row]) -> pd.DataFrame:
    """One line a row: quality with 95 % t intervals, and cost. All cells are text."""
    return pd.DataFrame([_line(row) for row in rows]).fillna("")


def _line(row: Row) -> dict[str, str]:
    steps, batch = row.training
    line = {
        "method": row.label,
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
    failed = len(row.records) - len(row.finished)
    if failed:
        line["method"] += f" ({failed} of {len(row.records)} seeds failed)"
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


def reference_record(rows: Sequence[Row]) -> Record | None:
    """The record of the teacher's own output, from which others' distance is measured, if it is there."""
    free = [record for row in rows if not row.training[0] for record in row.finished]
    return next((r for r in free if "distance_to_teacher" in r.metrics and r.metrics["distance_to_teacher"].mean == 0), None)


def headline(rows: Sequence[Row]) -> str:
    """The metric by which a task's rows are compared."""
    metrics = next(record for row in rows for record in row.finished).metrics
    return next(name for name in HEADLINES if name in metrics)


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
    """Pairs of trained rows that differ in one thing (a method or an option), paired within seed and noise set, Holm-corrected."""
    trained = [row for row in rows if row.training[0] and row.finished]
    if not trained:
        return pd.DataFrame()
    name = headline(rows)
    pairs: list[tuple[Row, Row, Difference]] = []
    for a, b in neighbours(trained, name):
        difference = paired_difference(a.finished, b.finished, name)
        if difference:
            pairs.append((a, b, difference))
    heading, digits = QUALITY[name]
    heading = heading.rstrip(" ↓↑") + " first − second"
    reference = reference_record(rows)
    significant = holm([difference.p_value for _, _, difference in pairs])
    lines = []
    for (a, b, difference), sure in zip(pairs, significant, strict=True):
        lower = a.label if difference.interval.mean < 0 else b.label
        ratio = degradation_ratio(a.finished, b.finished, reference, name) if reference else None
        lines.append({
            "first": a.label, "second": b.label, "steps": str(a.num_steps), "training": f"{a.training[0]} × {a.training[1]}",
            "seeds": str(difference.seeds), heading: difference.interval.text(digits), "p": f"{difference.p_value:.3g}",
            "better (Holm, 95 %)": lower if sure else "not shown",
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
    random = sorted({row.label for row in rows if row.finished and row.records[0].init == "random" and row.training[0]})
    if random:
        said.append(f"Students start from random weights in: {'; '.join(random)}.")
    shared = sorted({row.label for row in rows if any(record.trained_in for record in row.records)})
    if shared:
        said.append(f"One student was trained for all numbers of steps, and its bill stands in each of its rows, in: {'; '.join(shared)}.")
    targets = sorted({f"{row.label}: {row.records[0].target}" for row in rows if row.records[0].target != "guided teacher"})
    said.extend(f"Target is not the guided teacher in {target}." for target in targets)
    said.extend(sorted({f"{record.run_id}: {flag}." for record in records for flag in record.flags}))
    machines = {
        (e.device, e.cpu, e.python, e.packages.get("torch"), e.commit[:10] if e.commit else "no commit", e.code, e.dirty)
        for e in (record.environment for record in records)
    }
    for device, cpu, python, torch, commit, code, dirty in sorted(machines, key=str):
        state = " with uncommitted changes" if dirty else ""
        said.append(f"Made on {device} ({cpu}), Python {python}, torch {torch}, commit {commit}{state}, code {code}.")
    return said
