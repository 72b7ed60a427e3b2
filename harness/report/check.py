"""The regression check: records against a baseline.

    exact       parameters, MACs, NFE, and what numbers rest on (weights, reference, identities)
    tight       the first logged losses of a seeded run on a CPU, to one part in a thousand
    one-sided   the task's headline metric, by the spread of seeds; better is reported, not failed
    advisory    latency as a ratio to the reference's; it never fails

A row is a method with its settings. Its spread is the standard deviation over seeds of the
metric's logarithm. Few seeds estimate it badly, so the spread of all rows counts as
`POOLED_SEEDS` more. A row has regressed if its mean over seeds is worse than the baseline's by
more than other seeds would make it, so that one check in twenty calls a row wrongly. A row
without training has no seeds and must agree within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scipy import special

from harness.errors import CheckFailed
from harness.records import Record
from harness.report.baseline import Baseline, Entry, checkable, entry_of, full_label
from harness.report.labels import counted
from harness.report.rows import present_last
from harness.report.statistics import number
from harness.runs.identity import key_of_record

LEVEL = 0.05
"""One-sided level of all rows together."""
LOSS_TOLERANCE = 1e-3
"""Relative tolerance of the first losses."""
LATENCY_FACTOR = 1.25
"""Latency ratios within this factor count as the same."""
POOLED_SEEDS = 10
"""Seeds that the spread of all rows counts as, in each row's own."""
DEFAULT_SPREAD = 0.02
"""Spread where no row has two seeds."""
UNTRAINED_SPREAD = 0.001
"""Spread of a row without training, whose metric moves by rounding alone."""

State = Literal[
    "same", "regressed", "improved", "missing", "not comparable", "slower", "faster", "new"
]
FAILS: frozenset[State] = frozenset({"regressed", "missing", "not comparable"})


@dataclass(frozen=True)
class Finding:
    """One comparison."""

    label: str
    what: str
    state: State
    expected: str
    found: str
    allowed: str = ""


def compare(baseline: Baseline, records: Iterable[Record]) -> list[Finding]:
    """Every comparison that can be made, the baseline's runs first."""
    known = {key_of_record(record): record for record in present_last(records)}
    here = {
        key: entry_of(record)
        for key, record in known.items()
        if key in baseline.runs and record.status == "finished"
    }
    findings = []
    for key, entry in baseline.runs.items():
        findings += (
            _compare_run(_name(entry), entry, here[key])
            if key in here
            else [_missing(_name(entry), "record")]
        )
    findings += compare_quality(baseline, here)
    tasks = {entry.task for entry in baseline.runs.values()}
    new = [
        record
        for key, record in known.items()
        if key not in baseline.runs and record.task in tasks and checkable(record)
    ]
    for record in new:
        seed = _seed_of(record.config) if record.config["total_steps"] else ""
        findings.append(
            Finding(full_label(record) + seed, "record", "new", "", "not in the baseline")
        )
    return findings


def without_losses(baseline: Baseline) -> int:
    """How many trained runs of a baseline hold no first losses, so that none are compared."""
    return sum(entry.trains and not entry.losses for entry in baseline.runs.values())


def refuse_nothing(findings: Sequence[Finding]) -> None:
    """Raises CheckFailed if nothing was compared."""
    if all(finding.state in ("missing", "new") for finding in findings):
        raise CheckFailed(
            "nothing was compared: "
            "no record has the settings of any run of the baseline (--run makes them)"
        )


def _name(entry: Entry) -> str:
    return entry.label + (_seed_of(entry.config) if "seed" in entry.config else "")


def _seed_of(config: dict[str, Any]) -> str:
    return f", seed {config['seed']}"


def _missing(name: str, what: str, expected: str = "there") -> Finding:
    return Finding(
        name,
        what,
        "missing",
        expected,
        "no finished record" if what == "record" else "not in the record",
    )


def _compare_run(name: str, expected: Entry, found: Entry) -> list[Finding]:
    return [
        *_compare_exact(name, expected, found),
        *_compare_losses(name, expected, found),
        *_compare_latency(name, expected, found),
    ]


def _compare_exact(name: str, expected: Entry, found: Entry) -> list[Finding]:
    pairs = {**expected.exact, f"identity of {expected.quality.name}": expected.quality.identity}
    others = {**found.exact, f"identity of {found.quality.name}": found.quality.identity}
    findings = []
    for what in sorted(pairs.keys() | others.keys()):
        one, other = str(pairs.get(what, "nothing")), str(others.get(what, "nothing"))
        bad: State = "not comparable" if what.startswith(("identity", "hash")) else "regressed"
        findings.append(Finding(name, what, "same" if one == other else bad, one, other, "exact"))
    return findings


def _compare_losses(name: str, expected: Entry, found: Entry) -> list[Finding]:
    if not (expected.device == found.device == "cpu"):
        return []
    if expected.losses and not found.losses:
        return [_missing(name, "first losses")]
    findings = []
    for what, one in sorted(expected.losses.items()):
        if (other := found.losses.get(what)) is None:
            findings.append(_missing(name, f"first {what}", number(one, ".6g")))
            continue
        state: State = (
            "same"
            if math.isclose(one, other, rel_tol=LOSS_TOLERANCE, abs_tol=1e-9)
            else "regressed"
        )
        findings.append(
            Finding(
                name,
                f"first {what}",
                state,
                number(one, ".6g"),
                number(other, ".6g"),
                f"± {LOSS_TOLERANCE:.1%}",
            )
        )
    return findings


def _compare_latency(name: str, expected: Entry, found: Entry) -> list[Finding]:
    if expected.latency is None or found.latency is None or expected.device != found.device:
        return []
    factor = found.latency / expected.latency
    state: State = (
        "slower" if factor > LATENCY_FACTOR else "faster" if factor < 1 / LATENCY_FACTOR else "same"
    )
    return [
        Finding(
            name,
            "latency / reference",
            state,
            number(expected.latency, ".3f"),
            number(found.latency, ".3f"),
            "advisory",
        )
    ]


def compare_quality(baseline: Baseline, here: dict[str, Entry]) -> list[Finding]:
    """One finding a row, over the seeds that both sides have with equal identities."""
    rows: dict[str, dict[str, Entry]] = {}
    for key, entry in baseline.runs.items():
        rows.setdefault(entry.row, {})[key] = entry
    pooled = _squares([_logs(list(row.values())) for row in rows.values()])
    findings = []
    for row in rows.values():
        shared = [
            key
            for key, entry in row.items()
            if key in here and here[key].quality.identity == entry.quality.identity
        ]
        if shared:
            spread, freedom = _spread(list(row.values()), pooled)
            quantile = float(special.stdtrit(freedom, 1 - LEVEL / len(rows)))
            allowed = quantile * spread * math.sqrt(2 / len(shared))
            findings.append(
                _compare_row([row[key] for key in shared], [here[key] for key in shared], allowed)
            )
    return findings


def _compare_row(expected: Sequence[Entry], found: Sequence[Entry], allowed: float) -> Finding:
    """The means of a row's seeds here and in the baseline.

    Args:
        allowed: by how much the logarithm may be worse.
    """
    first, one, other = expected[0], _mean(_logs(expected)), _mean(_logs(found))
    worse = (other - one) * (1 if first.quality.lower_is_better else -1)
    if not all(math.isfinite(entry.quality.value) for entry in found):
        worse = math.inf
    state: State = "regressed" if worse > allowed else "improved" if worse < -allowed else "same"
    what = f"{first.quality.name}, {counted(len(expected), 'seed')}"
    return Finding(
        first.label,
        what,
        state,
        number(math.exp(one), ".4g"),
        number(math.exp(other), ".4g"),
        f"× {math.exp(allowed):.3f}",
    )


def _spread(entries: Sequence[Entry], pooled: tuple[float, int]) -> tuple[float, int]:
    """A row's standard deviation over seeds and its degrees of freedom.

    Args:
        pooled: squared deviations of all rows, and their degrees of freedom.
    """
    if not entries[0].trains:
        return UNTRAINED_SPREAD, POOLED_SEEDS
    squares, freedom = pooled
    if not freedom:
        return DEFAULT_SPREAD, POOLED_SEEDS
    own, own_freedom = _squares([_logs(entries)])
    added = min(freedom, POOLED_SEEDS)
    return math.sqrt((own + added * squares / freedom) / (own_freedom + added)), own_freedom + added


def _squares(rows: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Squared deviations from each row's mean, and their degrees of freedom."""
    squares = sum((value - _mean(values)) ** 2 for values in rows for value in values)
    return squares, sum(len(values) - 1 for values in rows)


def _logs(entries: Sequence[Entry]) -> list[float]:
    return [math.log(max(entry.quality.value, 1e-12)) for entry in entries]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
