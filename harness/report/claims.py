"""Published claims beside what was measured here: `baselines/claims.yaml`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from harness.errors import UsageError
from harness.files import read_yaml
from harness.records import Record
from harness.report.labels import counted
from harness.report.rows import HEADLINES, reference_record, rows_of
from harness.report.statistics import Interval, degradation_ratio, paired_difference, t_interval
from harness.runs.config import parse_config, parse_options
from harness.runs.cost import paper_problem, sampling_cost_on_meta
from harness.runs.identity import key_of_record
from harness.runs.resolve import resolve


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Holds(_Part):
    """What must be true of the interval here: one of these."""

    above: float | None = None
    below: float | None = None
    within: float | None = None
    """Part of the published value."""


class Claim(_Part):
    says: str
    source: str
    protocol: str
    published: float
    here: dict[str, Any] | None = None
    """The quantity here: `degradation_ratio` or `difference` of two runs, or `macs_ratio` of a method on a network size."""
    holds: Holds = Holds()
    needs: str = ""
    """What would be needed to measure it, where nothing here does."""


Verdict = Literal["reproduced", "reproduced in direction", "not reproduced", "not shown"]


def read_claims(path: Path) -> list[Claim]:
    """The claims of a file. Raises UsageError if it is broken."""
    try:
        return [Claim.model_validate(claim) for claim in read_yaml(path)["claims"]]
    except (ValidationError, KeyError, TypeError) as error:
        raise UsageError(f"claims file {path} is broken: {' '.join(str(error).split())}") from error


def claims_table(claims: Sequence[Claim], records: Sequence[Record]) -> pd.DataFrame:
    """One line a claim: what is published, what is here, and the verdict."""
    lines = []
    for claim in claims:
        found = measured(claim, records)
        value, where = found or (None, "")
        lines.append({
            "claim": claim.says, "source": claim.source, "protocol there": claim.protocol, "published": f"{claim.published:g}",
            "here": value.text(3) if value else "", "here / published": f"{value.mean / claim.published:.2f}" if value else "",
            "on": where, "verdict": verdict(claim, value) if value else f"not run: {claim.needs or 'its runs are not finished'}",
        })  # fmt: skip
    return pd.DataFrame(lines)


def verdict(claim: Claim, found: Interval) -> Verdict:
    """Whether all of the interval, none of it or a part of it is what the claim says; one seed alone shows nothing, but for counts."""
    exact = claim.here is not None and claim.here["quantity"] == "macs_ratio"
    if math.isnan(found.half_width) and not exact:
        return "not shown"
    width = 0.0 if exact else found.half_width
    low, high, holds = found.mean - width, found.mean + width, claim.holds
    if holds.above is not None:
        inside, outside = low > holds.above, high <= holds.above
    elif holds.below is not None:
        inside, outside = high < holds.below, low >= holds.below
    else:
        off = abs(claim.published) * (holds.within if holds.within is not None else 0.0)
        least, most = claim.published - off, claim.published + off
        return "reproduced" if least <= low and high <= most else "not reproduced" if high < least or low > most else "not shown"
    return "reproduced in direction" if inside else "not reproduced" if outside else "not shown"


def measured(claim: Claim, records: Sequence[Record]) -> tuple[Interval, str] | None:
    """The quantity of a claim and what it was measured on, or None if its runs are not there."""
    if claim.here is None:
        return None
    asked = dict(claim.here)
    quantity = asked.pop("quantity")
    if quantity == "macs_ratio":
        problem = paper_problem(asked["network"], asked["image_size"], True, 1000, asked["num_steps"])
        cost = sampling_cost_on_meta(asked["method"], parse_options(asked["method"], asked["options"]), problem, asked["num_steps"])
        return Interval(cost.macs / cost.plain_macs, math.nan), "counted on the network itself"
    first, second = (_row(asked[name], records) for name in ("first", "second"))
    if not first or not second:
        return None
    name = next(name for name in HEADLINES if name in first[0].metrics)
    if quantity == "difference":
        return _difference(first, second, name), _on(first)
    if quantity != "degradation_ratio":
        raise UsageError(f"claims: quantity is {quantity!r}, but must be one of: degradation_ratio, difference, macs_ratio")
    reference = reference_record(record for record in records if record.task == first[0].task and record.status == "finished")
    ratio = degradation_ratio(first, second, reference, name) if reference else None
    return (ratio, _on(first)) if ratio else None


def _row(asked: dict[str, Any], records: Sequence[Record]) -> list[Record]:
    """The finished records of a run config, one a seed."""
    alike = [record for record in records if record.task == asked["task"]]
    if not alike:
        return []
    resolved = resolve(parse_config(asked))
    alike = [record for record in alike if (record.method, record.config["num_steps"]) == (resolved.method, resolved.num_steps)]
    found = [record for record in alike if key_of_record(record) == resolved.with_seed(record.config["seed"]).key]
    return [record for row in rows_of(found) for record in row.finished]


def _difference(first: list[Record], second: list[Record], name: str) -> Interval:
    """first - second: over the seeds of both, or against the one record of a run without training, over noise sets that both have."""
    if second[0].config["total_steps"]:
        found = paired_difference(first, second, name)
        return found.interval if found else Interval(first[0].metrics[name].mean - second[0].metrics[name].mean, math.nan)
    beside = second[0].metrics[name].values
    differences = []
    for record in first:
        values = record.metrics[name].values
        shared = values.keys() & beside.keys()
        differences.append(sum(values[k] - beside[k] for k in shared) / len(shared))
    return t_interval(differences)


def _on(row: Sequence[Record]) -> str:
    return f"{row[0].task}, {counted(row[0].config['num_steps'])}, {counted(len(row), 'seed')}"
