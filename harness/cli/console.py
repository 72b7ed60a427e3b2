"""Progress on stderr: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
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
from rich.text import Text

from harness.errors import printable
from harness.progress import Progress


class Plain(Console):
    """A console that prints text as it is: names from outside are no markup, emoji or colours."""

    def render_str(self, text: str, **options: Any) -> Text:
        lines = "\n".join(map(printable, text.split("\n")))
        return super().render_str(lines, **{**options, "markup": False, "emoji": False})


class Display:
    """Shows the stages of a run; use it as a context manager.

    Args:
        console: where lines go.
        plain_every: seconds between two lines of one stage, without a terminal.
        name: prefix of each line, for one of several processes that share a terminal.
    """

    def __init__(self, console: Console, plain_every: float = 15.0, name: str = ""):
        self.console, self.plain_every, self.name = console, plain_every, name
        self.progress = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def __call__(self, stage: str) -> Progress:
        """A callback for one stage; it takes the numbers of items done and of all items."""
        bar = self.progress.add_task(stage, total=None)
        started = printed = time.monotonic()

        def update(done: int, total: int) -> None:
            nonlocal printed
            self.progress.update(bar, completed=done, total=total)
            now = time.monotonic()
            if not self.console.is_terminal and (done == total or now - printed > self.plain_every):
                printed = now
                self.say(f"{stage}: {done}/{total} after {now - started:.0f} s")

        return update

    def say(self, text: str) -> None:
        """Prints a line."""
        self.console.print(
            f"{self.name}: {text}" if self.name else text, highlight=False, soft_wrap=True
        )
