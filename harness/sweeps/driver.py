"""The driver of a sweep: keeps K jobs in flight on an engine, and restarts those that die."""

from __future__ import annotations

import signal
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import FrameType, TracebackType
from typing import Generic, TypeVar

from harness.errors import Interrupted, RunFailed, UsageError
from harness.sweeps.engines import Died, Engine, Job

TRIES = 3
"""How often a run is started whose process dies."""
ANSWERS = (0, RunFailed.exit_code, UsageError.exit_code)
"""Exit codes of a child that came to an end of its own; any other means that it died."""
T = TypeVar("T")


class Driver(Generic[T]):
    """Keeps up to K jobs in flight. Use it as a context manager.

    When its block is left by an error, SIGINT or SIGTERM, all jobs are stopped and waited for.

    Args:
        workers: K.

    Attributes:
        lost: the items whose processes died, with the reasons, in the order of their ends; an item
            that was started again stands there too.
    """

    def __init__(self, engine: Engine, workers: int):
        self.engine, self.workers, self.stopped = engine, workers, False
        self.flying: dict[Future[tuple[str, list[str]]], T] = {}
        self.lost: list[tuple[T, str]] = []

    def __enter__(self) -> Driver[T]:
        self.pool = ThreadPoolExecutor(self.workers)
        self.handler = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None:
                self.stopped = True
                self.engine.stop()
        finally:
            self.pool.shutdown(cancel_futures=True)
            signal.signal(signal.SIGTERM, self.handler)

    @staticmethod
    def _terminate(number: int, frame: FrameType | None) -> None:
        raise Interrupted("stopped by SIGTERM; the same command goes on")

    @property
    def full(self) -> bool:
        """Whether as many jobs are in flight as may be."""
        return len(self.flying) >= self.workers

    def start(self, item: T, job: Job) -> None:
        """Starts a job; `next` returns its item when it ends."""
        self.flying[self.pool.submit(self._settle, job)] = item

    def next(self) -> tuple[T, str]:
        """Waits for a job to end.

        Returns:
            Its item, and why it died, or "" if it left a record.

        Raises UsageError if the job refused its run.
        """
        ended, _ = wait(self.flying, return_when=FIRST_COMPLETED)
        future = next(future for future in self.flying if future in ended)
        item = self.flying.pop(future)
        died, reasons = future.result()
        self.lost += [(item, reason) for reason in reasons]
        return item, died

    def _settle(self, job: Job) -> tuple[str, list[str]]:
        """Runs a job, again if it dies. Returns why it left no record, or "", and every death."""
        reasons = []
        for _ in range(TRIES):
            try:
                code = self.engine.run(job)
            except Died as died:
                reasons.append(str(died))
            else:
                if code == UsageError.exit_code:
                    raise UsageError(
                        "a run was refused; its message is above, or in the logs of its job"
                    )
                if code in ANSWERS:
                    return "", reasons
                reasons.append(signal.Signals(-code).name if code < 0 else f"exit code {code}")
            if self.stopped:
                break
        return f"its process died {len(reasons)} times, at last by {reasons[-1]}", reasons
