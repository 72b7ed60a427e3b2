"""The state of a results folder: runs under way, how far they are, what failed, what is best."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from harness.errors import UsageError
from harness.files import inside
from harness.records import Record, read_record
from harness.report.rows import headline, rows_of
from harness.report.tables import QUALITY
from harness.runs.locks import held_names
from harness.runs.log import LINE


@dataclass(frozen=True)
class Working:
    """A run under way.

    Attributes:
        stage: the one that wrote the last line, such as "training"; empty before the first stage.
        done, total: how far that stage is; 0 of 0 before its first count in the log.
        seconds_left: of the stage, at the pace since it started; None before there is a pace.
        silent_for: seconds since its log grew.
    """

    run_id: str
    stage: str
    done: int
    total: int
    seconds_left: float | None
    silent_for: float


def working(results: Path, now: datetime | None = None) -> list[Working]:
    """The runs under way: those whose lock a process holds, with the last stage in their logs."""
    now, runs = now or datetime.now().astimezone(), results / "runs"
    return [_read_log(runs / name, now) for name in held_names(results) if (runs / name).is_dir()]


def _read_log(folder: Path, now: datetime) -> Working:
    path = folder / "run.log"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ()
    found = [match for line in lines if (match := LINE.match(line)) and _has_time(match)]
    starts = [i for i, match in enumerate(found) if match["run"]]
    found = found[starts[-1] :] if starts else []
    try:
        last = datetime.fromisoformat(found[-1]["time"])
        stage, done, total, left = _progress(found[1:])
    except (IndexError, ValueError, TypeError):  # no line yet, or one that nobody here wrote
        return Working(folder.name, "", 0, 0, None, 0.0)
    return Working(folder.name, stage, done, total, left, max(0.0, (now - last).total_seconds()))


def _has_time(match: re.Match[str]) -> bool:
    """Whether a line begins with a time and its zone; one that was damaged does not count."""
    try:
        return datetime.fromisoformat(match["time"]).tzinfo is not None
    except ValueError:
        return False


def _progress(found: Sequence[re.Match[str]]) -> tuple[str, int, int, float | None]:
    """The stage of the last line, its items done and in all, and the seconds that it has left.

    Stages nest: training makes the reference's samples at its first milestone. So only lines of the
    stage itself count.
    """
    if not found:
        return "", 0, 0, None
    stage = found[-1]["stage"]
    own = [match for match in found if match["stage"] == stage]
    begins = max((i for i, match in enumerate(own) if match["starts"]), default=0)
    # A resumed stage does not begin at 0, so two points make a pace, or the start and one.
    times = [datetime.fromisoformat(match["time"]) for match in own[begins:]]
    counts = [int(match["done"] or match["all"] or 0) for match in own[begins:]]
    total = int(own[-1]["total"] or own[-1]["all"] or 0)
    first = 1 if len(counts) > 2 else 0
    done, left = counts[-1], None
    if done > counts[first]:
        pace = (times[-1] - times[first]).total_seconds() / (done - counts[first])
        left = (total - done) * pace
    return stage, done, total, left


def summary(results: Path) -> dict[str, Any]:
    """Runs under way, interrupted and failed; per task the number of finished runs and the best.

    Raises UsageError if there is no such folder.
    """
    if not (results / "runs").is_dir():
        raise UsageError(
            f"there are no runs below {results}: `harness run` and `harness sweep` write them there"
        )
    runs = inside(results / "runs", results)
    records = [read_record(inside(path, runs)) for path in sorted(runs.glob("*/record.json"))]
    under_way = working(results)
    busy = {one.run_id for one in under_way}
    failed = {
        record.run_id: record.reason
        for record in records
        if record.status == "failed" and record.run_id not in busy
    }
    tasks = sorted({record.task for record in records})
    stopped = sorted(
        {path.parent.name for path in (results / "runs").glob("*/checkpoint")}
        - busy
        - failed.keys()
    )
    best = {task: _best([record for record in records if record.task == task]) for task in tasks}
    return {"working": under_way, "interrupted": stopped, "failed": failed, "tasks": best}


def _best(records: Sequence[Record]) -> dict[str, object]:
    """How many runs finished, and for each number of steps the trained row that is best."""
    rows = [row for row in rows_of(records) if row.finished and row.training[0]]
    best: dict[int, str] = {}
    for steps in sorted({row.num_steps for row in rows}):
        name = headline(rows)
        first = min(
            (row for row in rows if row.num_steps == steps),
            key=lambda row: row.interval(name).mean,
        )
        heading, digits = QUALITY[name]
        trained = f"trained {first.training[0]} × {first.training[1]}"
        value = first.text(name, digits)
        best[steps] = f"{first.label}, {trained}: {heading.rstrip(' ↓↑')} {value}"
    return {"finished": sum(record.status == "finished" for record in records), "best": best}
