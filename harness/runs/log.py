"""A run's log: what is noted while it is made, by which `harness status` later tells how far it is. Floor 7."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import torch

from harness.errors import Busy, Interrupted
from harness.progress import Progress
from harness.provenance import code_digest

Report = Callable[[str], Progress]
"""From the name of a stage to a callback that is told how far it is."""

LINE = re.compile(r"^(\S+) (.+?)(?:: (\d+)/(\d+)| starts| is done: \d+)$")
"""A line on a stage, as `logging_report` writes it: when, its name, and how far it is."""


def silent(stage: str) -> Progress:
    """A report of progress that nobody reads."""
    return lambda done, total: None


@contextmanager
def logged(path: Path, what: str) -> Iterator[Callable[[str], None]]:
    """Appends to a log: that something starts, what is said inside, and how it ends, with the traceback of an error."""
    with path.open("a", encoding="utf-8") as file:

        def log(text: str) -> None:
            file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n")
            file.flush()

        log(f"{what} starts: code {code_digest()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
        try:
            yield log
        except (Busy, Interrupted, KeyboardInterrupt) as error:
            log(f"{what}: {error or 'interrupted'}")
            raise
        except BaseException as error:
            log("".join(traceback.format_exception(error)).rstrip())
            raise
        log(f"{what} is finished")


def logging_report(report: Report, log: Callable[[str], None], every: float = 20.0) -> Report:
    """A report of progress that also notes in a log when a stage starts, every so many seconds how far it is, and when it is done."""

    def stage(name: str) -> Progress:
        show = report(name)
        log(f"{name} starts")
        noted = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal noted
            show(done, total)
            if done == total:
                log(f"{name} is done: {total}")
            elif time.monotonic() - noted > every:
                noted = time.monotonic()
                log(f"{name}: {done}/{total}")

        return progress

    return stage
