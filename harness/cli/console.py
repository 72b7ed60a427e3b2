"""What a person sees while something runs: a live display on a terminal, plain lines elsewhere; always on stderr. Floor 10."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from harness.data.trajectories import Progress as Callback


class Display:
    """Reports the stages of a run; use it as a context manager.

    Args:
        console: where to write.
        plain_every: seconds between two lines of one stage where there is no terminal.
        name: of whom speaks, before each line.
    """

    def __init__(self, console: Console, plain_every: float = 15.0, name: str = ""):
        self.console, self.plain_every, self.name = console, plain_every, name
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def __call__(self, stage: str) -> Callback:
        """A callback for one stage."""
        bar = self.progress.add_task(stage, total=None)
        started, said = time.monotonic(), time.monotonic()

        def update(done: int, total: int) -> None:
            nonlocal said
            self.progress.update(bar, completed=done, total=total)
            now = time.monotonic()
            if not self.console.is_terminal and (done == total or now - said > self.plain_every):
                said = now
                self.say(f"{stage}: {done}/{total} after {now - started:.0f} s")

        return update

    def say(self, text: str) -> None:
        """Prints a line."""
        self.console.print(f"{self.name}: {text}" if self.name else text, highlight=False, soft_wrap=True)
