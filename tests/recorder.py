"""A tracker that keeps what it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from PIL.Image import Image

from harness.progress import Follower, Kind, Subject


class Recorder(Follower):
    """Keeps what it is told as (kind, step, content), and raises at one kind if it should."""

    def __init__(self, raises: str = ""):
        self.raises, self.events = raises, list[tuple[Any, ...]]()

    @staticmethod
    def check() -> None:
        """It can always begin."""

    def begin(self, run: Subject) -> None:
        print("trackers print")
        self._note("begin", run.name, run.group)

    def numbers(self, kind: Kind, step: int, values: Mapping[str, float]) -> None:
        self._note(kind, step, dict(values))

    def picture(self, step: int, draw: Callable[[], Image]) -> None:
        self._note("samples", step, draw().size)

    def end(self, finished: bool) -> None:
        self._note("end", finished, None)

    def _note(self, kind: str, *more: Any) -> None:
        if kind == self.raises:
            raise ConnectionError("no network")
        self.events.append((kind, *more))

    def steps(self, kind: str) -> list[Any]:
        """The steps at which it was told this, in order."""
        return [step for name, step, _ in self.events if name == kind]

    def contents(self, kind: str) -> list[Any]:
        """What it was told of this kind, in order."""
        return [content for name, _, content in self.events if name == kind]
