"""The state of a results folder: active runs, failures and the best results so far.

Locks and logs show which runs are active.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from written import record

from harness.cli.main import main
from harness.errors import UsageError
from harness.records import write_record
from harness.report.status import summary, working
from harness.runs.locks import held

START = datetime.fromisoformat("2026-01-01T12:00:00+00:00")


def log(results: Path, run_id: str, *lines: tuple[int, str]) -> AbstractContextManager[Any]:
    """Writes a run's log, lines by seconds; inside the block its lock is held."""
    folder = results / "runs" / run_id
    folder.mkdir(parents=True)
    text = [f"{(START + timedelta(seconds=seconds)).isoformat()} {line}" for seconds, line in lines]
    (folder / "run.log").write_text("\n".join(text) + "\n")
    return held(results, run_id)


TRAINING = (
    (0, "run ard-4 starts: code c, torch 2, 1 threads"),
    (1, "trajectories starts"),
    (5, "trajectories is done: 4096"),
    (10, "training starts"),
    (30, "training: 100/1000"),
    (50, "training: 200/1000"),
)


def test_a_run_under_way_says_how_far_it_is(tmp_path: Path) -> None:
    with log(tmp_path, "ard-4", *TRAINING):
        (one,) = working(tmp_path, now=START + timedelta(seconds=57))
    assert (one.run_id, one.stage, one.done, one.total, one.silent_for) == (
        "ard-4",
        "training",
        200,
        1000,
        7,
    )
    assert one.seconds_left == pytest.approx(800 * 20 / 100)
    assert working(tmp_path) == []  # its lock is free


@pytest.mark.parametrize(
    ("lines", "stage", "left"),
    [
        (TRAINING[:1], "", None),
        (TRAINING[:2], "trajectories", None),
        (TRAINING[:4], "training", None),
        (TRAINING[:5], "training", 900 * 20 / 100),
        ((*TRAINING, (60, "sampling, noise set 0 starts")), "sampling, noise set 0", None),
        ((*TRAINING, (200, "run ard-4 starts: code c, torch 2")), "", None),
        ((), "", None),
    ],
)
def test_stages(
    lines: tuple[tuple[int, str], ...], stage: str, left: float | None, tmp_path: Path
) -> None:
    with log(tmp_path, "ard-4", *lines):
        (one,) = working(tmp_path, now=START + timedelta(seconds=100))
    assert (one.stage, one.seconds_left) == (stage, left)


def test_a_stage_inside_of_another_has_its_own_count(tmp_path: Path) -> None:
    """At its first milestone training makes the reference's samples, then goes on."""
    inside = (
        (60, "sampling, noise set 0 starts"),
        (80, "sampling, noise set 0: 500/2000"),
    )
    after = ((100, "sampling, noise set 0 is done: 2000"), (130, "training: 400/1000"))
    found = []
    for number, lines in enumerate((inside, (*inside, after[0]), (*inside, *after))):
        with log(tmp_path, f"ard-{number}", *TRAINING, *lines):
            (one,) = working(tmp_path, now=START + timedelta(seconds=131))
        found.append((one.stage, one.done, one.total, one.seconds_left))
    assert found == [
        ("sampling, noise set 0", 500, 2000, 60.0),
        ("sampling, noise set 0", 2000, 2000, 0.0),
        ("training", 400, 1000, 600 * 100 / 300),
    ]


def test_a_resumed_stage_is_paced_from_where_it_went_on(tmp_path: Path) -> None:
    lines = (
        *TRAINING,
        (200, "run ard-4 starts: code c"),
        (201, "training starts"),
        (220, "training: 600/1000"),
        (240, "training: 700/1000"),
    )
    with log(tmp_path, "ard-4", *lines):
        (one,) = working(tmp_path, now=START + timedelta(seconds=241))
    assert one.seconds_left == pytest.approx(300 * 20 / 100)


def test_the_command(tmp_path: Path, tiny: Any) -> None:
    for fid, run_id in ((5.0, "ard-a"), (4.0, "ard-b")):
        made = record(fid=fid).model_copy(
            update={"run_id": run_id, "options": {"history_layers": int(fid)}}
        )
        write_record(tmp_path / "runs" / run_id / "record.json", made)
    for name in ("ard-c", "ard-d"):  # what failed keeps its checkpoint, but is not interrupted
        (tmp_path / "runs" / name / "checkpoint").mkdir(parents=True)
    bad = record().model_copy(
        update={"run_id": "ard-c", "status": "failed", "reason": "not finite", "metrics": {}}
    )
    write_record(tmp_path / "runs" / "ard-c" / "record.json", bad)
    with log(tmp_path, "ard-4", *TRAINING):
        text = CliRunner().invoke(main, ["status", str(tmp_path)], env={"COLUMNS": "200"}).output
        found = json.loads(CliRunner().invoke(main, ["status", str(tmp_path), "--json"]).output)
    for part in (
        "training",
        "200/1000",
        "ard, history_layers 4, trained 100 × 64: FID 4.50",
        "not finite",
        "interrupted",
    ):
        assert part in text, part
    assert found["tasks"]["tiny"] == {
        "finished": 2,
        "best": {"4": "ard, history_layers 4, trained 100 × 64: FID 4.50"},
    }
    assert found["interrupted"] == ["ard-d"]
    assert found["failed"] == {"ard-c": "not finite"}
    with pytest.raises(UsageError, match="there are no runs below"):
        summary(tmp_path / "nowhere")


@pytest.mark.parametrize("line", ["2001-99-99 x: 1/2", f"{START.isoformat()} x: {'9' * 5000}/2"])
def test_a_log_that_nobody_here_wrote_is_no_progress(line: str, tmp_path: Path) -> None:
    with log(tmp_path, "a", (0, "run a starts: now")):
        with (tmp_path / "runs" / "a" / "run.log").open("a") as file:
            file.write(f"{line}\n")
        (found,) = working(tmp_path, START)
    assert (found.run_id, found.stage, found.seconds_left) == ("a", "", None)
