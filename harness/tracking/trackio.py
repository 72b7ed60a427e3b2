"""trackio: one SQLite file on this machine, in TRACKIO_DIR or where trackio keeps its files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from harness.progress import Follower, Kind, Subject

if TYPE_CHECKING:
    from PIL.Image import Image


class Trackio(Follower):
    """A run of trackio, which a resumed run goes on with."""

    @staticmethod
    def check() -> None:
        """It needs neither an account nor a network."""

    def begin(self, run: Subject) -> None:
        import trackio

        self.trackio = trackio
        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", run.project),
            name=run.name,
            group=run.group or None,
            config=run.config,
            resume="allow",
            embed=False,
        )

    def numbers(self, kind: Kind, step: int, values: Mapping[str, float]) -> None:
        self.run.log({f"{kind}/{name}": x for name, x in values.items()}, step=step)

    def picture(self, step: int, draw: Callable[[], Image]) -> None:
        self.run.log({"samples": self.trackio.Image(draw())}, step=step)

    def end(self, finished: bool) -> None:
        self.trackio.finish()
