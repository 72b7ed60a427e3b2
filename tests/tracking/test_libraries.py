"""The libraries themselves, without a network: what they wrote is read back."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.tracking import TRACKERS

pytestmark = pytest.mark.tracking

RUN = """
import sys
from pathlib import Path
from PIL import Image
from harness.progress import Subject
from harness.tracking.tracked import check_tracker, tracked

name, results, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
check_tracker(name)
folder = results / "runs" / "ard"
folder.mkdir(parents=True, exist_ok=True)
follower = tracked(name, "my sweep", sys.exit)
config = {"method": "ard", "seed": 0, "options": {"lr": 0.001}}
follower.begin(Subject("ard-2-0123", "abcd", folder, results, config))
for step in range(1, last + 1):
    follower.numbers("train", step, {"loss": 1 / step, "learning_rate": 0.5})
    if step % 3 == 0:
        follower.numbers("quality", step, {"fid": 30.0 / step})
        follower.picture(step, lambda: Image.new("RGB", (8, 4), "red"))
if last == 6:
    follower.done(last, {"fid": 5.0, "training_flops": 1e12})
follower.end(last == 6)
"""
"""Follows a run to its step 4 or to its end at step 6, from its start."""
EXPECTED = {
    "train/loss": {step: 1 / step for step in range(1, 7)},
    "train/learning_rate": dict.fromkeys(range(1, 7), 0.5),
    "quality/fid": {3: 10.0, 6: 5.0},
    "final/fid": {6: 5.0},
    "final/training_flops": {6: 1e12},
}
Point = tuple[str, int, float]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_resumed_run_is_one_run_with_each_point_once(name: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    for last in (4, 6):
        done = subprocess.run(
            [sys.executable, "-c", RUN, name, str(tmp_path), str(last)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
    points, pictures = READERS[name](tmp_path)
    found: dict[str, dict[int, float]] = {}
    for key, step, value in points:
        assert step not in found.setdefault(key, {}), f"{key} stands twice at step {step}"
        found[key][step] = pytest.approx(value, rel=1e-6)
    assert found == EXPECTED
    assert pictures == [3, 6]


def tensorboard(results: Path) -> tuple[list[Point], list[int]]:
    """What the reader of event files finds in the folder of the group and the run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(results / "tensorboard" / "my sweep" / "ard-2-0123-abcd"))
    events.Reload()
    tags = events.Tags()
    assert tags["tensors"] == ["config/text_summary"]
    assert len(events.Tensors("config/text_summary")) == 1
    points = [(tag, e.step, e.value) for tag in tags["scalars"] for e in events.Scalars(tag)]
    return points, [image.step for image in events.Images("samples")]


def wandb(results: Path) -> tuple[list[Point], list[int]]:
    """What the two offline folders of one run hold, which `wandb sync` joins."""
    from wandb.proto.wandb_internal_pb2 import Record

    points, pictures, files = (
        list[Point](),
        list[int](),
        sorted(results.glob("wandb/offline-*/*.wandb")),
    )
    assert len(files) == 2
    for file in files:
        for content in records(file.read_bytes()):
            record = Record.FromString(content)
            if record.HasField("run"):
                assert record.run.run_id == "ard-2-0123-abcd"
                assert record.run.run_group == "my sweep"
                assert record.run.project == "distillation-harness"
            if record.HasField("history"):
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                if any(key.startswith("samples") for key in row):
                    pictures.append(row["step"])
                points += [(k, row["step"], v) for k, v in row.items() if k in EXPECTED]
    return points, pictures


def records(content: bytes) -> Iterator[bytes]:
    """The records of a file of wandb: LevelDB's log format after 7 bytes of its own."""
    place, whole = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # a header does not cross the end of a block
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # the whole of a record, or its last part
            yield whole
            whole = b""


def trackio(results: Path) -> tuple[list[Point], list[int]]:
    """What the SQLite file holds."""
    points, pictures = list[Point](), list[int]()
    with sqlite3.connect(results / "trackio" / "distillation-harness.db") as database:
        assert database.execute("SELECT DISTINCT run_name FROM metrics").fetchall() == [
            ("ard-2-0123-abcd",)
        ]
        assert len(database.execute("SELECT DISTINCT run_id FROM metrics").fetchall()) == 1
        (config,) = database.execute("SELECT config FROM configs").fetchone()
        assert json.loads(config)["_Group"] == "my sweep"
        assert json.loads(config)["options"] == {"lr": 0.001}
        for step, text in database.execute("SELECT step, metrics FROM metrics ORDER BY id"):
            row: dict[str, Any] = json.loads(text)
            if picture := row.pop("samples", None):
                assert (results / "trackio" / "media" / picture["file_path"]).is_file()
                pictures.append(step)
            points += [(key, step, value) for key, value in row.items()]
    return points, pictures


READERS = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}
