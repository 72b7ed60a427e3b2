"""Published claims beside what was measured here: `baselines/claims.yaml`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from harness.documents import read_yaml
from harness.errors import UsageError
from harness.records import Record
from harness.report.labels import counted
from harness.report.rows import HEADLINES, reference_record, rows_of, without_trials
from harness.report.statistics import (
    Interval,
    crossed_interval,
    degradation_ratio,
    matrix_of,
    paired_difference,
)
from harness.runs.config import parse_config, parse_options
from harness.runs.cost import paper_problem, sampling_cost_on_meta
from harness.runs.identity import key_of_record
from harness.runs.resolve import resolve


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Holds(_Part):
    """The condition on the interval measured here: one of these."""

    above: float | None = None
    below: float | None = None
    within: float | None = None
    """Largest distance from the published value, as a part of it."""


class Claim(_Part):
    says: str
    source: str
    protocol: str
    """How the source measured it."""
    published: float
    here: dict[str, Any] | None = None
    """A `degradation_ratio` or `difference` of two runs, or the `macs_ratio` of a network."""
    holds: Holds = Holds()
    needs: str = ""
    """What a measurement would need, where none is possible here."""


Verdict = Literal["reproduced", "reproduced in direction", "not reproduced", "not shown"]


def read_claims(path: Path) -> list[Claim]:
    """The claims of a file. Raises UsageError if it is broken."""
    try:
        return [Claim.model_validate(claim) for claim in read_yaml(path)["claims"]]
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "a claim"
        raise UsageError(f"claims file {path} is broken ({place}: {first['msg']})") from error
    except (KeyError, TypeError) as error:
        raise UsageError(f"claims file {path} is broken: it needs a list of claims") from error


def claims_table(claims: Sequence[Claim], records: Sequence[Record]) -> pd.DataFrame:
    """One line a claim: the published value, the value measured here, and the verdict."""
    return pd.DataFrame([_line(claim, measured(claim, records)) for claim in claims])


def _line(claim: Claim, found: tuple[Interval, str] | None) -> dict[str, str]:
    value, place = found or (None, "")
    return {
        "claim": claim.says,
        "source": claim.source,
        "protocol there": claim.protocol,
        "published": f"{claim.published:g}",
        "here": value.text(3) if value else "",
        "here / published": f"{value.mean / claim.published:.2f}" if value else "",
        "on": place,
        "verdict": verdict(claim, value)
        if value
        else f"not run: {claim.needs or 'its runs are not finished, or a seed diverged'}",
    }


def verdict(claim: Claim, found: Interval) -> Verdict:
    """Whether all, none or a part of the interval satisfies the claim.

    A single seed has no interval and shows nothing; a count needs none.
    """
    counts = claim.here is not None and claim.here["quantity"] == "macs_ratio"
    if math.isnan(found.half_width) and not counts:
        return "not shown"
    width = 0.0 if counts else found.half_width
    low, high, holds = found.mean - width, found.mean + width, claim.holds
    if holds.above is not None:
        inside, outside = low > holds.above, high <= holds.above
    elif holds.below is not None:
        inside, outside = high < holds.below, low >= holds.below
    else:
        off = abs(claim.published) * (holds.within or 0.0)
        least, most = claim.published - off, claim.published + off
        return (
            "reproduced"
            if least <= low and high <= most
            else "not reproduced"
            if high < least or low > most
            else "not shown"
        )
    return "reproduced in direction" if inside else "not reproduced" if outside else "not shown"


def measured(claim: Claim, records: Sequence[Record]) -> tuple[Interval, str] | None:
    """The quantity of a claim and the runs it was measured on; None if they are missing."""
    if claim.here is None:
        return None
    asked = dict(claim.here)
    quantity = asked.pop("quantity")
    if quantity == "macs_ratio":
        return _macs_ratio(**asked), "counted on the network itself"
    first, second = (_row(asked[name], records) for name in ("first", "second"))
    if not first or not second:
        return None
    name = next(name for name in HEADLINES if name in first[0].metrics)
    if quantity == "difference":
        return _difference(first, second, name), _place(first)
    if quantity != "degradation_ratio":
        raise UsageError(
            f"claims: quantity is {quantity!r}, but must be one of: "
            "degradation_ratio, difference, macs_ratio"
        )
    of_task = without_trials([record for record in records if record.task == first[0].task])
    reference = reference_record(record for record in of_task if record.status == "finished")
    ratio = degradation_ratio(first, second, reference, name) if reference else None
    return (ratio, _place(first)) if ratio else None


def _macs_ratio(
    network: str, image_size: int, method: str, options: dict[str, Any], num_steps: int
) -> Interval:
    """Multiply-adds of a method's sampling over those of the plain network."""
    problem = paper_problem(network, image_size, True, 1000, num_steps)
    cost = sampling_cost_on_meta(method, parse_options(method, options), problem, num_steps)
    return Interval(cost.macs / cost.plain_macs, math.nan)


def _row(asked: dict[str, Any], records: Sequence[Record]) -> list[Record]:
    """The finished records of a run config, one a seed; none if a seed diverged."""
    of_task = [record for record in records if record.task == asked["task"]]
    if not of_task:
        return []
    resolved = resolve(parse_config(asked))
    for row in rows_of(of_task):
        first = row.records[0]
        if (first.method, row.num_steps) == (resolved.method, resolved.num_steps) and key_of_record(
            first
        ) == resolved.with_seed(first.config["seed"]).key:
            return [] if row.diverged else list(row.finished)
    return []


def _difference(first: list[Record], second: list[Record], name: str) -> Interval:
    """first - second over shared seeds and noise sets, or noise sets alone of an untrained one."""
    if second[0].config["total_steps"]:
        found = paired_difference(first, second, name)
        return (
            found.interval
            if found
            else Interval(first[0].metrics[name].mean - second[0].metrics[name].mean, math.nan)
        )
    values = matrix_of([*first, second[0]], name)
    differences = values[:-1] - values[-1]
    if len(first) == 1:
        return Interval(float(differences.mean()), math.nan)
    return crossed_interval(differences)


def _place(row: Sequence[Record]) -> str:
    return f"{row[0].task}, {counted(row[0].config['num_steps'])}, {counted(len(row), 'seed')}"
