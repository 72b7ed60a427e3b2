"""What a part is made of: rows, each measured by one call and written at once."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.files import write_text

Values = dict[str, Any]
Rows = Iterator[tuple[str, Callable[[], Values]]]
"""Names and calls. What a call returns goes into the file. Each of its "limits" bounds a value."""


@dataclass(frozen=True)
class Setting:
    """What every part is given.

    Attributes:
        device: the device under test.
        toy: whether sizes are those of a test on the CPU.
        out: the folder of the JSON file, of weights and cards.
        until: when the part should end, in seconds since the epoch.
    """

    device: torch.device
    toy: bool
    out: Path
    until: float

    @property
    def seconds_left(self) -> float:
        return self.until - time.time()

    def synchronise(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], repeats: int = 1) -> float:
        """Mean seconds of a call, the device waited for before and after."""
        self.synchronise()
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        self.synchronise()
        return (time.perf_counter() - started) / repeats


class Report:
    """The JSON file: what is known of each part, by name.

    Args:
        path: of the file; an existing one is continued, and parts that run again are replaced.
    """

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> Values:
        return json.loads(self.path.read_text()) if self.path.exists() else {"parts": {}}

    def start(self, part: str, about: Values) -> None:
        """Notes that a part starts, and where, when and by which command."""
        self._update(part, {**about, "status": "running", "reason": "", "seconds": 0.0, "rows": []})

    def add(self, part: str, row: Values) -> None:
        """Adds a row to a part."""
        self._update(part, {"rows": [*self.read()["parts"][part]["rows"], row]})

    def end(self, part: str, seconds: float, reason: str = "") -> None:
        """Notes how a part ended: `reason` is why it failed, if it did."""
        status = "failed" if reason else "finished"
        self._update(part, {"status": status, "reason": reason, "seconds": round(seconds, 1)})

    def _update(self, part: str, values: Values) -> None:
        content = self.read()
        content["parts"][part] = content["parts"].get(part, {}) | values
        write_text(self.path, json.dumps(content, indent=1, default=str) + "\n")


def run_rows(part: str, rows: Rows, setting: Setting, report: Report) -> None:
    """Measures the rows of a part in order; skips those that start after the deadline."""
    for name, call in rows:
        started = time.perf_counter()
        found = measured(call) if setting.seconds_left > 0 else skipped("no time was left")
        seconds = round(time.perf_counter() - started, 2)
        row = {"row": name, "status": found.pop("status"), "took_seconds": seconds, **found}
        report.add(part, row)
        print(f"{part}: {json.dumps(row, default=str)}", flush=True)


def skipped(reason: str) -> Values:
    """The values of a row that was not measured."""
    return {"status": "skipped", "reason": reason}


def measured(call: Callable[[], Values]) -> Values:
    """The values of a row; it fails if the call raises or a value exceeds its limit."""
    try:
        found = call()
    except Exception as error:  # whatever a card or a method does
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        return {
            "status": "failed",
            "reason": f"{type(error).__name__}: {str(error).strip()[:500]} ({place})",
        }
    limits = found.get("limits", {})
    above = [
        f"{name} is {found[name]:.3g}, above {limits[name]:g}"
        for name in limits
        if not found[name] <= limits[name]
    ]
    status = {"status": "failed", "reason": "; ".join(above)} if above else {"status": "finished"}
    return status | found
