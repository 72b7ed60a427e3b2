"""TensorBoard: event files in `tensorboard/<sweep>/<run>` of the results folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from harness.progress import Follower, Kind, Subject

if TYPE_CHECKING:
    from PIL.Image import Image


class TensorBoard(Follower):
    """A folder of event files for each run. A resumed run adds a file to its folder."""

    @staticmethod
    def check() -> None:
        """It needs neither an account nor a network."""

    def begin(self, run: Subject) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.results / "tensorboard" / run.group / run.name
        resumed = folder.exists()
        self.writer = SummaryWriter(str(folder))
        if not resumed:
            text = json.dumps(run.config, indent=1).replace("\n", "\n    ")
            self.writer.add_text("config", f"    {text}", 0)  # indented: code in Markdown

    def numbers(self, kind: Kind, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{kind}/{name}", value, step)
        self.writer.flush()

    def picture(self, step: int, draw: Callable[[], Image]) -> None:
        self.writer.add_image("samples", np.asarray(draw()), step, dataformats="HWC")
        self.writer.flush()

    def end(self, finished: bool) -> None:
        self.writer.close()
