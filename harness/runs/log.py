"""The log of a run; `harness status` reads the run's progress from it."""

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
"""From the name of a stage to its progress callback."""

LINE = re.compile(
    r"^(?P<time>\S+) (?:run (?P<run>\S+) starts: .*|(?P<stage>.+?)"
    r"(?:: (?P<done>\d+)/(?P<total>\d+)|(?P<starts> starts)| is done: (?P<all>\d+)))$"
)
"""A line of `logged` for a run's start, or of `logging_report`: a stage, its items done and all."""


def silent(stage: str) -> Progress:
    """A report that shows nothing."""
    return lambda done, total: None


@contextmanager
def logged(path: Path, what: str) -> Iterator[Callable[[str], None]]:
    """Appends to a log how something starts and ends, with the traceback of an error.

    Yields a function that appends a line.
    """
    with path.open("a", encoding="utf-8") as file:

        def log(text: str) -> None:
            file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n")
            file.flush()

        log(
            f"{what} starts: code {code_digest()}, torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads"
        )
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
    """A report that also logs each stage: its start, its progress and its end.

    Args:
        report: the report to extend.
        log: appends a line to the log.
        every: seconds between two lines of progress.
    """

    def stage(name: str) -> Progress:
        show = report(name)
        log(f"{name} starts")
        logged_at = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal logged_at
            show(done, total)
            if done == total:
                log(f"{name} is done: {total}")
            elif time.monotonic() - logged_at > every:
                logged_at = time.monotonic()
                log(f"{name}: {done}/{total}")

        return progress

    return stage
