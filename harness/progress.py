"""What a computation tells those who look on: how far it is, and what a run finds on its way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

Progress = Callable[[int, int], None]
"""Called with the number of items that are done and the number of all."""
Kind = Literal["train", "quality", "levels", "final"]
"""Numbers of a training step, of a milestone, of its noise levels, or of the finished record."""


@dataclass(frozen=True)
class Subject:
    """A run that is followed.

    Attributes:
        run_id: the run's name.
        code: the digest of the code that makes it, since other code makes a run anew.
        folder: the run's.
        results: the results folder.
        config: task, method, settings and options, plain values.
        group: the sweep that the run belongs to, or "".
        project: what trackers call all runs of all tasks.
    """

    run_id: str
    code: str
    folder: Path
    results: Path
    config: dict[str, Any]
    group: str = ""
    project: str = "distillation-harness"

    @property
    def name(self) -> str:
        """The name of the run and of its code."""
        return f"{self.run_id}-{self.code}"


class Follower:
    """Is told what a run finds; this one does nothing with it. No number depends on a follower.

    A resumed run tells its past again, so a follower may hear of a point twice.
    """

    def begin(self, run: Subject) -> None:
        """A run begins, goes on, or is found finished."""

    def numbers(self, kind: Kind, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name after a training step."""

    def picture(self, step: int, draw: Callable[[], Image]) -> None:
        """Samples after a training step; `draw` makes the picture, for those who want it."""

    def levels(self, step: int, measure: Callable[[], Mapping[str, float]]) -> None:
        """Noise levels after a training step; `measure` finds numbers, for those who want them."""

    def done(self, step: int, row: Mapping[str, float]) -> None:
        """The run is finished, now or before: its folder holds curve and samples; its row."""

    def end(self, finished: bool) -> None:
        """Nothing more comes: the run has finished, or it was interrupted or failed."""


NOBODY = Follower()


@dataclass(frozen=True)
class Both(Follower):
    """Two followers of one run."""

    one: Follower
    other: Follower

    def begin(self, run: Subject) -> None:
        self.one.begin(run)
        self.other.begin(run)

    def numbers(self, kind: Kind, step: int, values: Mapping[str, float]) -> None:
        self.one.numbers(kind, step, values)
        self.other.numbers(kind, step, values)

    def picture(self, step: int, draw: Callable[[], Image]) -> None:
        self.one.picture(step, draw)
        self.other.picture(step, draw)

    def levels(self, step: int, measure: Callable[[], Mapping[str, float]]) -> None:
        self.one.levels(step, measure)
        self.other.levels(step, measure)

    def done(self, step: int, row: Mapping[str, float]) -> None:
        self.one.done(step, row)
        self.other.done(step, row)

    def end(self, finished: bool) -> None:
        self.one.end(finished)
        self.other.end(finished)
