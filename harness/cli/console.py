"""Progress on stderr: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import islice
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from harness.errors import printable
from harness.progress import Follower, Kind, Progress

TRAINING = "training"
"""The stage that shows what a run finds."""


class Plain(Console):
    """A console that prints text as it is: names from outside are no markup, emoji or colours."""

    def render_str(self, text: str, **options: Any) -> Text:
        lines = "\n".join(map(printable, text.split("\n")))
        return super().render_str(lines, **{**options, "markup": False, "emoji": False})


class Display(Follower):
    """Shows the stages of a run, their speeds and remaining times; use it as a context manager.

    Training shows its losses and the last quality, which this is told as a run's follower.

    Args:
        console: where lines go.
        plain_every: seconds between two lines of one stage, without a terminal.
        name: prefix of each line, for one of several processes that share a terminal.
    """

    def __init__(self, console: Console, plain_every: float = 15.0, name: str = ""):
        self.console, self.plain_every, self.name = console, plain_every, name
        self.progress = Bars(
            TextColumn("{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[found]}", table_column=Column()),  # it alone may wrap
            console=console,
            disable=not console.is_terminal,
        )
        self.losses = self.quality = ""

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def __call__(self, stage: str) -> Progress:
        """A callback for one stage; it takes the numbers of items done and of all items."""
        bar = self.progress.add_task(stage, total=None, found="")
        started = printed = time.monotonic()

        def update(done: int, total: int) -> None:
            nonlocal printed
            self.progress.update(bar, completed=done, total=total)
            task = next(task for task in self.progress.tasks if task.id == bar)
            speed = [f"{task.speed:.3g} a second"] if task.speed else []
            found = [text for text in (self.losses, self.quality) if text and stage == TRAINING]
            self.progress.update(bar, found=", ".join([*speed, *found]))
            now = time.monotonic()
            if not self.console.is_terminal and (done == total or now - printed > self.plain_every):
                printed, left = now, task.time_remaining
                speed += [f"{duration(left)} left"] if left else []
                text = f"{stage}: {done}/{total} after {duration(now - started)}"
                self.say(", ".join([text, *speed, *found]))

        return update

    def numbers(self, kind: Kind, step: int, values: Mapping[str, float]) -> None:
        """Keeps the losses of a step, or the first numbers of a milestone, for the next update."""
        if kind == "train":
            losses = {n: x for n, x in values.items() if n.rpartition("/")[2] == "loss"}
            self.losses = texts(losses)
        elif kind == "quality":
            self.quality = f"{texts(dict(islice(values.items(), 2)))} at step {step}"

    def say(self, text: str) -> None:
        """Prints a line."""
        self.console.print(
            f"{self.name}: {text}" if self.name else text, highlight=False, soft_wrap=True
        )


def texts(values: Mapping[str, float]) -> str:
    """Numbers with their names."""
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


def duration(seconds: float) -> str:
    """Seconds, or minutes of a long time."""
    return f"{seconds:.0f} s" if seconds < 300 else f"{seconds / 60:.0f} minutes"
