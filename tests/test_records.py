"""Records are read as they were written, and broken ones are refused in one sentence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from written import ENVIRONMENT, LATENCY

from harness import records
from harness.errors import UsageError
from harness.records import (
    SCHEMA_VERSION,
    Cost,
    Environment,
    Metric,
    Record,
    TrainingBill,
    publish_records,
    published_records,
    read_record,
    write_record,
)


def full_record() -> Record:
    bill = TrainingBill(
        steps=300,
        images=19200,
        flops=1.5e12,
        trajectory_flops=1e12,
        teacher_evaluations=96,
        seconds=12.5,
        peak_memory_bytes=10**9,
        ema_initial_weight=0.001,
    )
    return Record(
        run_id="ard-4-0123456789",
        task="tiny",
        task_version=1,
        method="ard",
        options={"history_layers": 2, "lr": 0.001},
        config={
            "num_steps": 4,
            "seed": 0,
            "total_steps": 0,
            "batch_size": 0,
            "micro_batch_size": None,
            "precision": "fp32",
            "compile": False,
            "noise_sets": 1,
            "init_from": None,
        },
        target="guided teacher",
        hashes={"teacher": "ab"},
        status="finished",
        levels=[999.0, 749.0],
        metrics={
            "fid": Metric(values={0: 1.5, 1: 2.5}, n=40, direction="lower", identity={"n": 40})
        },
        cost=Cost(parameters=10, nfe=4.0, macs_per_sample=1000, latency=LATENCY, training=bill),
        flags=["a flag"],
        environment=ENVIRONMENT.model_copy(update={"commit": None, "dirty": None}),
    )


def test_a_record_survives_writing_and_reading(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a" / "record.json"
    write_record(path, full_record())
    assert read_record(path) == full_record()
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]
    assert json.loads(path.read_text())["schema_version"] == SCHEMA_VERSION


def broken(tmp_path: Path, text: str) -> str:
    """What reading this text as a record says."""
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_record(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_an_unknown_key_is_refused_by_name(tmp_path: Path) -> None:
    values = json.loads(full_record().model_dump_json())
    assert "surprise" in broken(tmp_path, json.dumps({**values, "surprise": 1}))
    values["cost"]["training"]["hidden"] = 1
    assert "cost.training.hidden" in broken(tmp_path, json.dumps(values))


def test_a_missing_key_is_refused_by_name(tmp_path: Path) -> None:
    values = json.loads(full_record().model_dump_json())
    del values["run_id"]
    assert "run_id" in broken(tmp_path, json.dumps(values))


def test_truncated_json_is_refused(tmp_path: Path) -> None:
    text = full_record().model_dump_json(indent=1)
    assert "cannot be read" in broken(tmp_path, text[: len(text) // 2])
    assert "cannot be read" in broken(tmp_path, "")


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    values = {**json.loads(full_record().model_dump_json()), "schema_version": SCHEMA_VERSION + 1}
    assert f"this version reads schema {SCHEMA_VERSION}" in broken(tmp_path, json.dumps(values))
    assert f"this version reads schema {SCHEMA_VERSION}" in broken(
        tmp_path, json.dumps({**values, "novelty": 1})
    )


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"record .*none\.json cannot be read: No such file"):
        read_record(tmp_path / "none.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_written_can_be_read_or_is_refused_at_once(value: float, tmp_path: Path) -> None:
    record = full_record()
    try:
        record.metrics["fid"] = Metric(values={0: value}, n=40, direction="lower", identity={})
        write_record(tmp_path / "record.json", record)
    except ValueError:
        return
    assert str(read_record(tmp_path / "record.json").metrics["fid"].values[0]) == str(value)


def test_a_metrics_mean_and_identity() -> None:
    metric = full_record().metrics["fid"]
    assert metric.mean == 2.0
    same = Metric(values={0: 9.0}, n=40, direction="lower", identity={"n": 40})
    assert metric.identity_hash == same.identity_hash
    assert metric.identity_hash != same.model_copy(update={"identity": {"n": 41}}).identity_hash


def test_a_record_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="it is not JSON in UTF-8"):
        read_record(tmp_path / "record.json")


def named(run_id: str, floor: float = 0.25, **identity: object) -> Record:
    """A record with a metric and its floor."""
    floors = Metric(values={0: floor}, n=9, direction="lower", identity={"n": 9, **identity})
    fid = Metric(values={0: 0.1 + 0.2}, n=40, direction="lower", identity={"n": 40, **identity})
    return full_record().model_copy(
        update={"run_id": run_id, "metrics": {"fid": fid, "fid_floor": floors}}
    )


def test_published_records_are_read_as_they_were(tmp_path: Path) -> None:
    """Also where two identities and two floors stand in one task."""
    made = [named("b"), named("a", floor=float("inf")), named("c", version=2)]
    publish_records(tmp_path / "tiny", made)
    assert (
        published_records(tmp_path)
        == published_records(tmp_path / "tiny")
        == [made[1], made[0], made[2]]
    )
    assert len((tmp_path / "tiny" / "records.jsonl").read_text().splitlines()) == 3
    assert '"version"' not in (tmp_path / "tiny" / "records.jsonl").read_text()


def test_publishing_adds_lines_and_keeps_the_others(tmp_path: Path) -> None:
    publish_records(tmp_path, [named("b"), named("d")])
    path = tmp_path / "records.jsonl"
    # Another version may have written the records with other spaces.
    path.write_text(path.read_text().replace('":', '": '))
    b, d = path.read_text().splitlines()
    publish_records(tmp_path, [named("c"), named("b")])
    kept, _, last = path.read_text().splitlines()
    assert (kept, last) == (b, d)
    publish_records(tmp_path, [named("b", floor=3.0)])
    assert published_records(tmp_path) == [named("b", floor=3.0), named("c"), named("d")]


def test_who_reads_while_another_publishes_sees_old_or_new_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`shared.json` is written first and read last, so it knows what each line names."""
    publish_records(tmp_path, [named("a", floor=1.0)])
    read_shared = records._read_shared

    def publishing(folder: Path) -> Any:
        monkeypatch.setattr(records, "_read_shared", read_shared)
        publish_records(folder, [named("b", floor=2.0)])
        return read_shared(folder)

    def publishing_after(folder: Path) -> Any:
        found = read_shared(folder)
        monkeypatch.setattr(records, "_read_shared", read_shared)
        publish_records(folder, [named("c", floor=3.0)])
        return found

    for between in (publishing, publishing_after):
        monkeypatch.setattr(records, "_read_shared", between)
        assert named("a", floor=1.0) in published_records(tmp_path)
    assert len(published_records(tmp_path)) == 3


def test_two_branches_that_publish_are_merged_by_their_lines(tmp_path: Path) -> None:
    for branch, run_id in (("ours", "b"), ("theirs", "c")):
        publish_records(tmp_path / branch, [named("a")])
        publish_records(tmp_path / branch, [named(run_id)])
    lines = [
        (tmp_path / branch / "records.jsonl").read_text().splitlines()
        for branch in ("ours", "theirs")
    ]
    (tmp_path / "ours" / "records.jsonl").write_text(
        "\n".join(dict.fromkeys([*lines[0], *lines[1]]))
    )
    assert [one.run_id for one in published_records(tmp_path / "ours")] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "records.jsonl",
            '{"schema',
            '<<<<<<< HEAD\n{"schema',
            r"line 1 of .*records\.jsonl cannot be read: it is not JSON",
        ),
        (
            "records.jsonl",
            '"method":"ard"',
            '"way":"ard"',
            r"line 1 of .*records\.jsonl cannot be read: it was changed since it was written; take",
        ),
        ("records.jsonl", '"metrics"', '"numbers"', r"line 1 of .* lacks 'metrics'"),
        (
            "shared.json",
            '"identities"',
            '"names"',
            r"line 1 of .*: it, or shared\.json beside it, lacks '[0-9a-f]{12}'",
        ),
        ("shared.json", "{", "", r"shared\.json cannot be read: it is not JSON"),
    ],
)
def test_broken_published_records_are_refused_by_line(
    file: str, old: str, new: str, message: str, tmp_path: Path
) -> None:
    publish_records(tmp_path, [named("a")])
    (tmp_path / file).write_text((tmp_path / file).read_text().replace(old, new, 1))
    with pytest.raises(UsageError, match=message):
        published_records(tmp_path)


def test_two_lines_of_one_run_are_refused(tmp_path: Path) -> None:
    """A merge that kept both must be settled by hand."""
    publish_records(tmp_path / "ours", [named("a")])
    publish_records(tmp_path / "theirs", [named("a", version=2)])
    lines = [(tmp_path / branch / "records.jsonl").read_text() for branch in ("ours", "theirs")]
    publish_records(tmp_path / "ours", [named("b", version=2)])  # so that its identity is known
    (tmp_path / "ours" / "records.jsonl").write_text("".join(lines))
    with pytest.raises(UsageError, match="has two lines of run a: delete one"):
        published_records(tmp_path / "ours")


RESULTS = Path(__file__).parent.parent / "results"


def without(content: Any, place: tuple[str, ...]) -> Any:
    """JSON-like content without the key at a place."""
    first, *rest = place
    found = {name: value for name, value in content.items() if name != first}
    return found if not rest else {**found, first: without(content[first], tuple(rest))}


def places(model: type[BaseModel], content: Any, above: tuple[str, ...] = ()) -> Iterator[Any]:
    """The places of a record's keys, each with whether older records may lack it."""
    for name, field in model.model_fields.items():
        yield (*above, name), not field.is_required()
        inside = content.get(name)
        part = {"cost": Cost, "training": TrainingBill, "environment": Environment}.get(name)
        if part and isinstance(inside, dict):
            yield from places(part, inside, (*above, name))


def test_records_of_older_versions_are_read_or_refused_by_key(tmp_path: Path) -> None:
    """A key that later versions added has a default; any other is named."""
    path, whole = tmp_path / "record.json", json.loads(full_record().model_dump_json())
    kinds = list(places(Record, whole))
    assert len(kinds) > 40
    for place, free in kinds:
        path.write_text(json.dumps(without(whole, place)))
        if free:
            assert read_record(path).run_id == "ard-4-0123456789"
            continue
        with pytest.raises(UsageError, match=re.escape(f"({'.'.join(place)}: Field required)")):
            read_record(path)
    for schema in (0, 2, None):
        path.write_text(json.dumps({**whole, "schema_version": schema}))
        with pytest.raises(UsageError, match=rf"schema_version: .*reads schema {SCHEMA_VERSION}"):
            read_record(path)


def test_committed_records_are_read(tmp_path: Path) -> None:
    """Those that were published before records had seals, too, and a later one stands beside."""
    lines = (RESULTS / "digits" / "records.jsonl").read_text().splitlines()
    found = published_records(RESULTS / "digits")
    assert len(found) == len(lines) > 0
    shutil.copytree(RESULTS / "digits", tmp_path / "digits")
    publish_records(tmp_path / "digits", [named("z")])
    *before, last = (tmp_path / "digits" / "records.jsonl").read_text().splitlines()
    assert before == lines
    assert json.loads(last)["sha256"]
    assert published_records(tmp_path) == [*found, named("z")]


@pytest.mark.parametrize("file", ["record.json", "records.jsonl", "shared.json"])
def test_a_changed_digit_is_no_new_number(file: str, tmp_path: Path) -> None:
    """Each is valid JSON of the right types."""
    write_record(tmp_path / "record.json", full_record())
    publish_records(tmp_path, [named("a")])
    path = tmp_path / file
    old, new = {"record.json": ("2.5", "2.4")}.get(file, ("0.25", "0.24"))
    if file == "records.jsonl":
        old, new = "0.30000000000000004", "0.20000000000000004"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    read = {"record.json": read_record}.get(file, lambda path: published_records(path.parent))
    with pytest.raises(UsageError, match="it was changed since it was written; "):
        read(path)
    path.write_text(json.dumps(json.loads(text), indent=3) if file == "record.json" else text)
    read(path)  # spaces are free
