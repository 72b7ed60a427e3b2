"""The regression check: records beside a baseline file. Floor 9.

    exact       parameters, MACs, NFE, and what every number rests on (weights, reference, a metric's identity)
    tight       the first logged losses of a seeded run on a CPU, to one part in a thousand
    one-sided   the task's headline metric, by the spread of seeds: worse is a regression, better is told
    advisory    latency, as a ratio to the reference's; it never fails

A row is a method with its settings; its spread is the standard deviation over seeds of the metric's logarithm. Few seeds tell little of
it, so that the spread of all rows counts in it as ten more seeds would. A row has regressed if its mean over seeds is worse than the
baseline's by more than other seeds would make it: so much that one of all its rows would be called wrongly once in twenty checks. What
is not trained has no seeds and must be equal to half a percent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from scipy import stats

from harness.errors import CheckFailed, UsageError
from harness.files import write_text
from harness.methods import METHODS
from harness.records import Environment, Record
from harness.report.rows import HEADLINES, counted, label, present_last
from harness.runs.config import RunConfig, parse_config
from harness.runs.external import from_outside
from harness.runs.identity import key_of_record, row_key
from harness.tasks import load_task, task_names

LEVEL, TIGHT, LATENCY, UNKNOWN_SPREAD, EXACT_SAMPLER, LENT = 0.05, 1e-3, 1.25, 0.02, 0.001, 10
"""One-sided level of all rows together; tolerance of losses; advisory factor of latency; spread if no row has two seeds, and of a
sampler that nothing trains, whose metric moves by rounding alone; seeds that all rows lend."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Quality(_Part):
    """A metric's mean over noise sets, and the hash of all that determines what it means."""

    name: str
    value: float
    lower_is_better: bool
    identity: str


class Entry(_Part):
    """What is known of one run."""

    task: str
    label: str
    row: str
    """Digest of method and settings without the seed."""
    config: dict[str, Any]
    """What makes it, as `harness run --config` takes it; empty for a run that starts from another one."""
    exact: dict[str, float | str]
    losses: dict[str, float]
    device: str
    quality: Quality
    latency: float | None
    trains: bool


class Baseline(_Part):
    """A baseline file."""

    schema_version: Literal[1] = 1
    command: str
    environment: Environment
    """Of one of its records."""
    runs: dict[str, Entry]


State = Literal["same", "regressed", "improved", "missing", "not comparable", "slower", "faster", "new"]
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


def entry_of(record: Record) -> Entry:
    """What a baseline keeps of a finished record."""
    name = next((name for name in HEADLINES if name in record.metrics), None)
    if name is None or record.cost is None:
        raise UsageError(f"record {record.run_id} has none of {', '.join(HEADLINES)}, by which a run is checked")
    metric, cost, config = record.metrics[name], record.cost, record.config
    exact: dict[str, float | str] = {"parameters": cost.parameters, "MACs": cost.macs_per_sample, "NFE": cost.nfe}
    return Entry(
        task=record.task,
        label=_told(record),
        row=row_key(record),
        config={} if config["init_from"] else config_of(record),
        exact=exact | {f"hash of {part}": value for part, value in record.hashes.items()},
        losses=record.first_losses, device=record.environment.device, latency=cost.latency.ratio if cost.latency else None,
        trains=bool(config["total_steps"]),
        quality=Quality(name=name, value=metric.mean, lower_is_better=metric.direction == "lower", identity=metric.identity_hash),
    )  # fmt: skip


def _told(record: Record) -> str:
    return f"{record.task}: {label(record)}, {counted(record.config['num_steps'])}"


def config_of(record: Record) -> dict[str, Any]:
    """The config that makes a record again."""
    config, spec = record.config, load_task(record.task).spec
    steps = config["total_steps"]
    trains = record.method in METHODS.names() and bool(METHODS[record.method].sources)
    named = [name for name, budget in spec.budgets.items()
             if budget.noise_sets == config["noise_sets"] and (not trains or budget.steps == steps)]  # fmt: skip
    found = {"task": record.task, "method": record.method, "options": record.options, "num_steps": config["num_steps"],
             "budget": named[0] if named else f"steps={steps}"}  # fmt: skip
    if not named and config["noise_sets"] != spec.evaluation.noise_sets:
        found["noise_sets"] = config["noise_sets"]
    if steps:
        sizes = {name: config[name] for name in ("batch_size", "micro_batch_size", "precision", "compile") if config.get(name)}
        found |= {"seed": config["seed"], **sizes}
    return found


def read_baseline(path: Path) -> Baseline:
    """Reads a baseline file. Raises UsageError if it is not there or broken."""
    try:
        return Baseline.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read baseline {path}: {error.strerror}; --update makes one") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"baseline {path} is no text in UTF-8; --update makes it anew") from error
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"])) or "the whole file"
        raise UsageError(f"baseline {path} cannot be read ({place}: {error.errors()[0]['msg']}); --update makes it anew") from error


def checkable(record: Record) -> bool:
    """Whether a record belongs into a baseline: it finished, on a task of ours, by a method that is loaded, and is no work from outside."""
    known = record.task in task_names() and record.method in METHODS.names()
    return record.status == "finished" and known and not from_outside(record)


def baseline_of(records: Sequence[Record], command: str) -> Baseline:
    """The baseline that those of the records make that are `checkable`. Raises UsageError if there is none."""
    finished = [record for record in present_last(records) if checkable(record)]
    if not finished:
        raise UsageError("there is no finished record to make a baseline of")
    entries = {key_of_record(record): entry_of(record) for record in finished}
    return Baseline(
        command=command, environment=finished[0].environment, runs=dict(sorted(entries.items(), key=lambda item: item[1].label))
    )


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Writes a baseline aside and renames it."""
    write_text(path, json.dumps(baseline.model_dump(mode="json"), indent=1) + "\n")


def configs_of(baseline: Baseline) -> list[RunConfig]:
    """The runs that make a baseline's records again. Raises UsageError for one that starts from another run."""
    if alone := [entry.label for entry in baseline.runs.values() if not entry.config]:
        raise UsageError(f"{alone[0]} starts from another run and cannot be made from its config alone: check its records")
    return [parse_config(entry.config) for entry in baseline.runs.values()]


def compare(baseline: Baseline, records: Iterable[Record]) -> list[Finding]:
    """Every comparison that can be made, rows of the baseline first."""
    known = {key_of_record(record): record for record in present_last(records)}
    here = {key: entry_of(record) for key, record in known.items() if key in baseline.runs and record.status == "finished"}
    findings = []
    for key, entry in baseline.runs.items():
        name = _name(entry)
        if key not in here:
            findings.append(Finding(name, "record", "missing", "there", "no finished record"))
        else:
            findings += [*_exact(name, entry, here[key]), *_losses(name, entry, here[key]), *_latency(name, entry, here[key])]
    findings += _quality(baseline, here)
    tasks = {entry.task for entry in baseline.runs.values()}
    new = [record for key, record in known.items() if key not in baseline.runs and record.task in tasks and checkable(record)]
    for record in new:
        seed = _seed_of(record.config) if record.config["total_steps"] else ""
        findings.append(Finding(_told(record) + seed, "record", "new", "", "not in the baseline"))
    return findings


def without_losses(baseline: Baseline) -> int:
    """How many trained runs of a baseline hold no first losses, so that none are compared."""
    return sum(entry.trains and not entry.losses for entry in baseline.runs.values())


def refuse_nothing(findings: Sequence[Finding]) -> None:
    """Raises CheckFailed if nothing was compared."""
    if all(finding.state in ("missing", "new") for finding in findings):
        raise CheckFailed("nothing was compared: no record has the settings of any run of the baseline (--run makes them)")


def _name(entry: Entry) -> str:
    return entry.label + (_seed_of(entry.config) if "seed" in entry.config else "")


def _seed_of(config: dict[str, Any]) -> str:
    return f", seed {config['seed']}"


def _exact(name: str, expected: Entry, found: Entry) -> list[Finding]:
    pairs = {**expected.exact, f"identity of {expected.quality.name}": expected.quality.identity}
    others = {**found.exact, f"identity of {found.quality.name}": found.quality.identity}
    findings = []
    for what in pairs.keys() | others.keys():
        one, other = str(pairs.get(what, "nothing")), str(others.get(what, "nothing"))
        bad: State = "not comparable" if what.startswith(("identity", "hash")) else "regressed"
        findings.append(Finding(name, what, "same" if one == other else bad, one, other, "exact"))
    return sorted(findings, key=lambda finding: finding.what)


def _losses(name: str, expected: Entry, found: Entry) -> list[Finding]:
    if not (expected.device == found.device == "cpu"):
        return []
    findings = []
    if expected.losses and not found.losses:
        return [Finding(name, "first losses", "missing", "there", "not in the record")]
    for what, one in expected.losses.items():
        if (other := found.losses.get(what)) is None:
            findings.append(Finding(name, f"first {what}", "missing", f"{one:.6g}", "not in the record"))
            continue
        close = math.isclose(one, other, rel_tol=TIGHT, abs_tol=1e-9)
        findings.append(Finding(name, f"first {what}", "same" if close else "regressed", f"{one:.6g}", f"{other:.6g}", f"± {TIGHT:.1%}"))
    return sorted(findings, key=lambda finding: finding.what)


def _latency(name: str, expected: Entry, found: Entry) -> list[Finding]:
    if expected.latency is None or found.latency is None or expected.device != found.device:
        return []
    factor = found.latency / expected.latency
    state: State = "slower" if factor > LATENCY else "faster" if factor < 1 / LATENCY else "same"
    return [Finding(name, "latency / reference", state, f"{expected.latency:.3f}", f"{found.latency:.3f}", "advisory")]


def _quality(baseline: Baseline, here: dict[str, Entry]) -> list[Finding]:
    """One finding a row, over the seeds that are there on both sides with equal identities."""
    rows: dict[str, list[str]] = {}
    for key, entry in baseline.runs.items():
        rows.setdefault(entry.row, []).append(key)
    logs = {row: [_log(baseline.runs[key].quality.value) for key in keys] for row, keys in rows.items()}
    squares = sum((value - sum(values) / len(values)) ** 2 for values in logs.values() for value in values)
    pooled_freedom = sum(len(values) - 1 for values in logs.values())
    findings = []
    for row, keys in rows.items():
        shared = [key for key in keys if key in here and here[key].quality.identity == baseline.runs[key].quality.identity]
        if not shared:
            continue
        first, values = baseline.runs[keys[0]], logs[row]
        own = sum((value - sum(values) / len(values)) ** 2 for value in values)
        if not first.trains:
            freedom, spread = LENT, EXACT_SAMPLER
        elif pooled_freedom:
            lent = min(pooled_freedom, LENT)
            freedom = len(values) - 1 + lent
            spread = math.sqrt((own + lent * squares / pooled_freedom) / freedom)
        else:
            freedom, spread = LENT, UNKNOWN_SPREAD
        expected = sum(_log(baseline.runs[key].quality.value) for key in shared) / len(shared)
        found = sum(_log(here[key].quality.value) for key in shared) / len(shared)
        allowed = float(stats.t.ppf(1 - LEVEL / len(rows), freedom)) * spread * math.sqrt(2 / len(shared))
        worse = (found - expected) * (1 if first.quality.lower_is_better else -1)
        state: State = "regressed" if worse > allowed else "improved" if worse < -allowed else "same"
        what = f"{first.quality.name}, {counted(len(shared), 'seed')}"
        findings.append(
            Finding(first.label, what, state, f"{math.exp(expected):.4g}", f"{math.exp(found):.4g}", f"× {math.exp(allowed):.3f}")
        )
    return findings


def _log(value: float) -> float:
    return math.log(max(value, 1e-12))
