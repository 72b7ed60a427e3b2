"""The record of a run: typed, versioned, and published as one line of a task's file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from harness.documents import parse_json, read_lines, read_text
from harness.errors import UsageError
from harness.files import check_name, digest, inside, write_text
from harness.seals import CHANGED, read_sealed_json, sealed, unsealed, write_sealed_json

SCHEMA_VERSION: Literal[1] = 1
FROM_GIT = "; take the committed file, or delete it and publish the runs again"


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings"
    )


def _named(text: str) -> str:
    try:
        return check_name(text, "a name")
    except UsageError as error:
        raise ValueError(str(error)) from error


Name = Annotated[str, AfterValidator(_named)]
"""Text that becomes a part of a path, so that no record leads out of its folder."""


class Start(BaseModel):
    """The run that another one started from."""

    run_id: Name
    setting: str
    sha256: str


class Settings(BaseModel):
    """What reports read of a record's config; what else stands there is left as it is."""

    model_config = ConfigDict(extra="allow")

    num_steps: int = Field(ge=1)
    seed: int
    total_steps: int = Field(ge=0)
    batch_size: int = Field(ge=0)
    micro_batch_size: int | None
    precision: str
    compile: bool
    noise_sets: int = Field(ge=1)
    init_from: Start | None


class _WithSettings(BaseModel):
    config: Settings


class Metric(_Part):
    """One metric of a run.

    Two metrics may share a column of a table only if their identities are equal.
    """

    values: dict[int, float] = Field(min_length=1)
    """Value on each evaluation noise set."""
    n: int
    """Samples behind each value."""
    direction: Literal["lower", "higher", "none"]
    """Which way is better."""
    identity: dict[str, Any]
    """Everything the number depends on: features, reference, noise, rounding, library."""

    @property
    def mean(self) -> float:
        """Mean over the noise sets."""
        return sum(self.values.values()) / len(self.values)

    @property
    def identity_hash(self) -> str:
        """Short hash of the identity."""
        return digest(self.identity)[:12]


class Exposure(_Part):
    """RMS error of a pixel after each step against the teacher's trajectory, on held-out noise."""

    on_teachers_history: list[float]
    """The error where all earlier states come from the teacher."""
    on_own_history: list[float]
    """The error where they come from the student itself."""
    drift: list[float] = []
    """Root mean squared distance between the predictions on the two histories."""
    n: int
    """Number of trajectories."""


class LatencyEntry(_Part):
    """Latency of the sampler, with its protocol."""

    seconds: float
    """Median seconds of a batch."""
    reference_seconds: float
    """Median seconds of the reference on the same inputs, interleaved."""
    ratio: float
    """Median of the ratio to the reference."""
    reference: str
    batch: int
    dtype: str
    device: str
    threads: int
    warmup: int
    repeats: int
    graph_seconds: float | None = None
    """Median seconds of the batch as a CUDA graph, which no Python slows down."""
    graph_ratio: float | None = None
    """Median of the ratio to the reference, both as CUDA graphs."""


class Milestone(_Part):
    """Quality of the averaged weights at a part of the budget, on noise set 0."""

    step: int
    images: int
    flops: float
    """Training FLOPs until then, trajectories not included."""
    quality: dict[str, float]
    n: int | None = None
    """Number of samples, the first of the set; None is all of them, the metrics' N."""


class TrainingBill(_Part):
    """The cost of training the student."""

    steps: int
    images: int
    """Samples that the losses were called on."""
    flops: float
    """Training FLOPs, trajectories not included."""
    trajectory_flops: float
    """FLOPs of all the task's trajectories, charged in full."""
    teacher_evaluations: int
    """Teacher passes for trajectories and inside the losses."""
    seconds: float
    peak_memory_bytes: int
    mfu: float | None = None
    """FLOPs a second over the dense bf16 peak of the GPUs (model FLOPs utilisation), where known.
    """
    inherited_flops: float = 0.0
    """FLOPs of the runs that this one builds on; images and seconds likewise."""
    inherited_images: int = 0
    inherited_seconds: float = 0.0
    ema_initial_weight: float
    """Largest share of the initial parameters in an evaluated average; above 0.01 it is flagged."""

    @property
    def student_flops(self) -> float:
        """Training FLOPs of this run and of the runs that it started from."""
        return self.flops + self.inherited_flops

    @property
    def whole_flops(self) -> float:
        """Training FLOPs with those of the trajectories."""
        return self.student_flops + self.trajectory_flops


class Cost(_Part):
    parameters: int
    """Numbers of the sampled network, those of adapters included."""
    trained_parameters: int | None = None
    """Those that training changes; None without training, and in older records."""
    nfe: float
    """Network passes a sample, measured."""
    macs_per_sample: int
    """Multiply-adds a sample, counted on the sampler that ran."""
    merged_macs_per_sample: int | None = None
    """The same once adapters are merged into the weights; None for a student without adapters."""
    latency: LatencyEntry | None = None
    training: TrainingBill | None = None
    """None for a training-free method."""


class Environment(_Part):
    """Where a record was made."""

    commit: str | None
    dirty: bool | None
    """Whether the package's files differ from the commit's."""
    code: str
    """Digest of the harness's sources that decide numbers."""
    python: str
    packages: dict[str, str]
    device: str
    cpu: str
    threads: int
    ranks: int = 1
    """Processes that made the run together."""


class Record(_Part):
    """The result of one run."""

    schema_version: Literal[1] = SCHEMA_VERSION
    run_id: Name
    task: Name
    task_version: int
    method: Name
    options: dict[str, Any]
    """Resolved options of the method."""
    config: dict[str, Any]
    """The rest of the resolved run config."""
    target: str
    """The distribution that the method aims at."""
    init: Literal["teacher", "random"] = "teacher"
    """The weights that the student starts from, unless `config.init_from` names a run."""
    trained_in: Name | Literal[""] = ""
    """The run that trained this student, if another one did; its bill is repeated here."""
    hashes: dict[str, str]
    status: Literal["finished", "failed"]
    reason: str = ""
    """The cause of a failure."""
    levels: list[float] = []
    """DiT's level numbers that the sampler visited."""
    metrics: dict[str, Metric] = {}
    first_losses: dict[str, float] = {}
    """The losses and metrics of the first logged training step."""
    milestones: list[Milestone] = []
    """Quality at 1/8, 1/4, 1/2 and the whole of the budget."""
    exposure: Exposure | None = None
    """Only for a deterministic sampler whose steps, two or more, divide the trajectories'."""
    cost: Cost | None = None
    flags: list[str] = []
    """Warnings for a reader, a sentence each."""
    environment: Environment


def read_record(path: Path) -> Record:
    """Reads the record of one run. Raises UsageError for a broken file or another schema."""
    try:
        return _record(read_sealed_json(path, required=False))
    except (OSError, ValueError) as error:
        remedy = "; delete it and the same command makes the run again"
        raise _unreadable(f"record {path}", error, remedy) from error


def _record(content: Any) -> Record:
    """A record from outside. Raises ValidationError, also where its config lacks a setting."""
    record = Record.model_validate(content)
    _WithSettings.model_validate({"config": record.config})
    return record


def write_record(path: Path, record: Record) -> None:
    """Writes the record of one run aside and renames it."""
    write_sealed_json(path, json.loads(record.model_dump_json()))


def published_records(results: Path) -> list[Record]:
    """The published records of a results folder (`<task>/records.jsonl`), or of one task's folder.

    Raises UsageError for a file that cannot be read.
    """
    paths = [*results.glob("*/records.jsonl"), *results.glob("records.jsonl")]
    folders = [inside(path, results).parent for path in sorted(paths)]
    return [record for folder in folders for _, record in _read_lines(folder).values()]


def publish_records(folder: Path, records: Iterable[Record]) -> None:
    """Adds records to a task's folder: a line each in `records.jsonl`, sorted by run id.

    `shared.json` holds the identities and floors of metrics, which records refer to by hash. Lines
    of records that are there already keep their bytes.
    """
    lines, shared = _read_lines(folder), _read_shared(folder)
    for record in records:
        if record.run_id not in lines or lines[record.run_id][1] != record:
            lines[record.run_id] = (
                json.dumps(_packed(record, shared), separators=(",", ":")),
                record,
            )
    write_text(folder / "shared.json", json.dumps(shared, indent=1, sort_keys=True) + "\n")
    write_text(
        folder / "records.jsonl", "".join(f"{lines[run_id][0]}\n" for run_id in sorted(lines))
    )


def _read_lines(folder: Path) -> dict[str, tuple[str, Record]]:
    """The lines of a task's folder with their records, by run id."""
    path, found = folder / "records.jsonl", dict[str, tuple[str, Record]]()
    lines = [*_lines(path)]  # first: whoever publishes meanwhile writes shared.json before them
    shared = _read_shared(folder)
    for number, line in enumerate(lines, 1):
        try:
            record = _record(unsealed(_unpacked(parse_json(line), shared)))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _unreadable(f"line {number} of {path}", error, FROM_GIT) from error
        if found.get(record.run_id, (line,))[0] != line:
            raise UsageError(f"{path} has two lines of run {record.run_id}: delete one")
        found[record.run_id] = line, record
    if path.exists() and not found and shared["identities"]:
        raise UsageError(f"{path} is empty, but shared.json beside it is not{FROM_GIT}")
    return found


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from read_lines(path) if path.exists() else ()
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(f"{path}", error, FROM_GIT) from error


def _read_shared(folder: Path) -> dict[str, dict[str, Any]]:
    """Identities and floors of metrics by hash; both empty where nothing is published yet."""
    path = inside(folder / "shared.json", folder)
    try:
        shared = parse_json(read_text(path)) if path.exists() else {}
        found = {part: dict(shared.get(part, {})) for part in ("identities", "floors")}
        for key, value in (item for table in found.values() for item in table.items()):
            if _short_hash(value) != key:
                raise ValueError(f"{key}: {CHANGED}")
        return found
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise _unreadable(f"{path}", error, FROM_GIT) from error


def _packed(record: Record, shared: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A record as it is published, sealed; its identities and floors go to `shared`."""
    content = sealed(json.loads(record.model_dump_json()))
    for name, metric in content["metrics"].items():
        metric["identity"] = _put(metric["identity"], shared["identities"])
        if name.endswith("_floor"):
            content["metrics"][name] = _put(metric, shared["floors"])
    return content


def _put(value: Any, table: dict[str, Any]) -> str:
    """Puts a value into a table under its short hash, which it returns."""
    key = _short_hash(value)
    table[key] = value
    return key


def _short_hash(value: Any) -> str:
    return digest(value)[:12]


def _unpacked(content: dict[str, Any], shared: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The inverse of `_packed`. Raises LookupError for a hash that `shared` lacks."""
    metrics = {}
    for name, entry in content["metrics"].items():
        metric = shared["floors"][entry] if isinstance(entry, str) else entry
        metrics[name] = {**metric, "identity": shared["identities"][metric["identity"]]}
    return {**content, "metrics": metrics}


def _unreadable(what: str, error: Exception, remedy: str) -> UsageError:
    """The error for a file of records that cannot be read, in one sentence."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole record"
        return UsageError(
            f"{what} cannot be read ({place}: {first['msg']}); "
            f"this version reads schema {SCHEMA_VERSION}{remedy}"
        )
    if isinstance(error, LookupError):
        lacks = f"it, or shared.json beside it, lacks {error}"
        return UsageError(f"{what} cannot be read: {lacks}{remedy}")
    if isinstance(error, OSError):
        return UsageError(f"{what} cannot be read: {error.strerror}")
    no_json = isinstance(error, UnicodeDecodeError | json.JSONDecodeError)
    reason = "it is not JSON in UTF-8" if no_json else str(error)
    return UsageError(f"{what} cannot be read: {reason}{remedy}")
