"""What stands between a run and a tracker: no point is told twice, and no error reaches the run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from harness.data.readers import open_picture
from harness.documents import parse_json
from harness.errors import UsageError, sentence
from harness.progress import NOBODY, Follower, Kind, Subject
from harness.tracking import TRACKERS

OF_TRAINING = "gradient_norm"
"""Ends a name in each line of a file of curves that is of a training step, and in no other."""


def check_tracker(name: str | None) -> None:
    """Raises UsageError if a tracker's package is missing, or if the tracker cannot begin."""
    if not name:
        return
    spec = find_spec(name)
    if spec is None or spec.origin is None:  # a folder of that name is no package
        raise UsageError(
            f"--track {name} needs a package that is not installed: "
            f"pip install 'distillation-harness[{name}]'"
        )
    _class_of(name).check()


def tracked(name: str | None, group: str, say: Callable[[str], None]) -> Follower:
    """What tells a tracker of runs, one after the other; nobody without a name.

    Args:
        group: the sweep that the runs belong to, or "".
        say: prints a line.
    """
    return Tracked(name, _class_of(name)(), group, say) if name else NOBODY


def _class_of(name: str) -> Any:
    return getattr(import_module(f"harness.tracking.{name}"), TRACKERS[name])


class Tracked(Follower):
    """Tells a tracker of each point of a run once, until the tracker raises: then nothing more.

    What it was told stands in the run's folder, so a resumed run does not tell it again. A point
    is noted before it is told: a process that is killed in between loses it.
    """

    def __init__(self, name: str, tracker: Follower, group: str, say: Callable[[str], None]):
        self.name, self.tracker, self.group, self.say = name, tracker, group, say
        self.open, self.failed = False, False

    def begin(self, run: Subject) -> None:
        self.run, self.open = run, not self.failed
        self._tell(lambda: self._begin(run))

    def _begin(self, run: Subject) -> None:
        self.notes = Notes(run.folder / f"tracked-{self.name}-{run.code}.jsonl", self.group)
        self.open = not self.notes.complete
        if self.open:
            self.tracker.begin(replace(run, group=self.notes.group))

    def numbers(self, kind: Kind, step: int, values: Mapping[str, float]) -> None:
        if finite := finite_of(values):
            self._once(kind, step, lambda: self.tracker.numbers(kind, step, finite))

    def picture(self, step: int, draw: Callable[[], Image.Image]) -> None:
        self._once("samples", step, lambda: self.tracker.picture(step, draw))

    def levels(self, step: int, measure: Callable[[], Mapping[str, float]]) -> None:
        self._once(
            "levels", step, lambda: self.tracker.numbers("levels", step, finite_of(measure()))
        )

    def done(self, step: int, row: Mapping[str, float]) -> None:
        self._tell(self._tell_folder)
        if (grid := self.run.folder / "samples.png").exists():
            self.picture(step, lambda: open_picture(grid))
        self.numbers("final", step, row)

    def _tell_folder(self) -> None:
        for kind, step, values in curve_of(self.run.folder / "curves.jsonl"):
            self.numbers(kind, step, values)

    def end(self, finished: bool) -> None:
        self._tell(lambda: self.tracker.end(finished))
        self.open = False

    def _once(self, kind: str, step: int, tell: Callable[[], None]) -> None:
        """Tells a point unless it was told."""
        if self.open and (kind, step) not in self.notes.told:
            self._tell(lambda: self.notes.add(kind, step))
            self._tell(tell)

    def _tell(self, tell: Callable[[], None]) -> None:
        """Calls the tracker. What it prints goes to stderr, since stdout is for results.

        An error is said, and no concern of the run's.
        """
        if not self.open:
            return
        try:
            with redirect_stdout(sys.stderr):
                tell()
        except Exception as error:
            self.open, self.failed = False, True
            reason = sentence(f"{type(error).__name__}: {error}")
            self.say(f"--track {self.name} stops, the run goes on: {reason}")


def finite_of(values: Mapping[str, float]) -> dict[str, float]:
    """The numbers that are finite."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


class Notes:
    """What a tracker was told of a run: lines of JSON, first the group, then kind and step.

    Attributes:
        group: that under which the run was first tracked.
    """

    def __init__(self, path: Path, group: str):
        self.path, self.told = path, set[tuple[str, int]]()
        found = list(_lines(path))
        groups = [line["group"] for line in found if isinstance(line, dict)]
        self.told = {(kind, step) for kind, step in (x for x in found if isinstance(x, list))}
        self.group = groups[0] if groups else group
        if not groups:
            self._write({"group": group})

    @property
    def complete(self) -> bool:
        """Whether the last of a finished run was told."""
        return any(kind == "final" for kind, _ in self.told)

    def add(self, kind: str, step: int) -> None:
        """Notes a point."""
        self.told.add((kind, step))
        self._write([kind, step])

    def _write(self, line: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:  # the last line may be cut off
            file.write("\n" + json.dumps(line))


def curve_of(path: Path) -> Iterator[tuple[Kind, int, dict[str, float]]]:
    """The points of a run's `curves.jsonl`, if it trained: kind, step and numbers."""
    for line in _lines(path):
        step = line.pop("step")
        of_training = any(name.endswith(OF_TRAINING) for name in line)
        yield "train" if of_training else "quality", step, line


def _lines(path: Path) -> Iterator[Any]:
    """The values of a file of JSON lines; a line that was cut off or damaged does not count."""
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError):
            yield parse_json(line.decode())
