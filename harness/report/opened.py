"""What a row of the HTML page opens: its numbers, options, commands and records."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from pydantic import ValidationError

from harness.errors import UsageError
from harness.methods import METHODS
from harness.records import Record
from harness.report.labels import counted
from harness.report.markup import escaped
from harness.report.rows import Row, trains
from harness.report.tables import QUALITY, diversity
from harness.runs.export import command_of
from harness.runs.external import from_outside
from harness.tasks import Task, load_task, task_names


class Room:
    """The letters that pictures and records may still add to a page."""

    def __init__(self, left: int) -> None:
        self.left = left

    def takes(self, letters: int) -> bool:
        """Whether so many letters still fit; if so, they are taken."""
        fits = letters <= self.left
        self.left -= letters * fits
        return fits

    def embedded(self, picture: bytes) -> str:
        """A PNG as an address that holds it; empty where it does not fit."""
        data = base64.b64encode(picture).decode()
        return f"data:image/png;base64,{data}" if self.takes(len(data)) else ""


def measured() -> dict[str, tuple[str, int]]:
    """Heading and digits of the metrics that two rows are compared by."""
    return {**QUALITY, **diversity()}


def opened(row: Row, anchor: str, facts: Mapping[str, str], picture: str, room: Room) -> str:
    """The part of the page that a row opens.

    Args:
        anchor: its id.
        facts: its line in the table of all rows.
        picture: the link to its samples, or the sentence why there are none.
        room: what is left for its records.
    """
    first = row.records[0]
    settings = {name: value for name, value in first.config.items() if name != "seed"}
    options = [
        (name, value, "differs from the default of this task" if name in row.off_task else "")
        for name, value in row.options.items()
    ]
    options += [(name, value, "") for name, value in settings.items()]
    flags = dict.fromkeys(flag for record in row.records for flag in record.flags)
    remarks = "".join(f"<li>{escaped(flag)}</li>" for flag in flags)
    commands = "\n".join(dict.fromkeys(map(command_text, row.records)))
    title = f"{escaped(row.label)}, {counted(row.num_steps)}"
    parts = [
        ("Samples", f'<div class="samples">{picture}</div>'),
        ("Numbers", _pairs("facts", ((*item, "") for item in facts.items() if item[1]))),
        ("Remarks", f"<ul>{remarks}</ul>" if remarks else ""),
        ("Options and settings", _pairs("options", options)),
        ("Command to repeat it", f'<pre class="command" tabindex="0">{commands}</pre>'),
        ("Record", "".join(_record(record, room) for record in row.records)),
    ]
    inner = "".join(
        f'<div class="part"><h5>{heading}</h5>{part}</div>' for heading, part in parts if part
    )
    return (
        f'<article id="{anchor}" data-name="{title}" data-values="{escaped(_values(row))}">'
        f"<h4>{title}</h4>{inner}</article>"
    )


def command_text(record: Record) -> str:
    """The command that repeats a run, escaped, or a sentence why there is none."""
    if from_outside(record):
        return "# Not trained here: harness evaluate measured samples or weights from elsewhere."
    if record.method not in METHODS.names():
        return f"# No command: this installation has no method {escaped(record.method)}."
    try:
        task = _shipped(record.task)
        if task and task.spec.version != record.task_version:
            return f"# No command: the task here has version {task.spec.version}."
        return escaped(command_of(record, task, None if task else "TASK.yaml"))
    except (UsageError, ValidationError):
        return "# No command: its options are those of another version of the method."


@cache
def _shipped(task: str) -> Task | None:
    """A task by name; None if it does not ship."""
    return load_task(task) if task in task_names() else None


def _values(row: Row) -> str:
    """The metrics of each seed by noise set as JSON; what is not finite is left out."""
    metrics = {
        name: [record.metrics[name].values for record in row.finished]
        for name in measured()
        if row.finished and all(_finite(record, name) for record in row.finished)
    }
    return json.dumps(
        {
            "seeds": [record.config["seed"] for record in row.finished],
            "trained": trains(row.records[0]),
            "diverged": bool(row.diverged),
            "metrics": metrics,
        }
    )


def _finite(record: Record, name: str) -> bool:
    return name in record.metrics and all(map(math.isfinite, record.metrics[name].values.values()))


def _pairs(kind: str, lines: Iterable[tuple[str, Any, str]]) -> str:
    """A table of names and values, with a remark where there is one."""
    rows = "".join(
        f'<tr><th scope="row">{escaped(name)}</th><td>{escaped(str(value))}'
        + (f" <small>{remark}</small>" if remark else "")
        + "</td></tr>"
        for name, value, remark in lines
    )
    return f'<table class="{kind}"><tbody>{rows}</tbody></table>'


def _record(record: Record, room: Room) -> str:
    """The record of a run as JSON, folded; where it lies if the page has no room left."""
    content = json.dumps(json.loads(record.model_dump_json()), indent=1)
    head = f"{escaped(record.run_id)}, seed {record.config['seed']}, {record.status}"
    text = html.escape(content, quote=False)
    inner = (
        f'<pre class="record" tabindex="0">{text}</pre>'
        if room.takes(len(text))
        else "<p>The page would be too large with this record. "
        "<code>harness report RESULTS --json</code> prints it.</p>"
    )
    return f"<details><summary>{head}</summary>{inner}</details>"
