"""One run in a child process, described by JSON on the command line of `harness _job`."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from harness.documents import parse_json
from harness.errors import RunFailed, UsageError
from harness.files import digest
from harness.progress import NOBODY, Follower
from harness.provenance import PLUGIN_SOURCES, code_digest
from harness.records import Record
from harness.runs.config import RunConfig
from harness.runs.log import Report
from harness.runs.resolve import Resolved, resolve
from harness.runs.run import Run
from harness.sweeps.engines import Job

MILESTONES_FILE = "milestones.jsonl"
"""Kept by a run that may be pruned: at each milestone, thousandths of the budget and a value."""
PRUNED = "pruned: "
"""How the reason of a pruned run begins."""


class Pruning(BaseModel):
    """Gives a run up whose best value so far is worse than the median of finished trials then.

    Attributes:
        objective: the metric that is compared.
        sign: 1 if low values are good, -1 if high ones are.
        medians: by thousandths of the budget.
    """

    model_config = ConfigDict(frozen=True)

    objective: str
    sign: int
    medians: dict[int, float]

    def judge(self, file: Path) -> Callable[[float, dict[str, float]], None]:
        """A `Run.judge` that keeps the values in a file, so that a resumed run knows them."""

        def judge(part: float, quality: dict[str, float]) -> None:
            if self.objective not in quality:
                return
            place = round(1000 * part)
            point = [place, quality[self.objective]]
            with file.open("a", encoding="utf-8") as lines:  # the last line may be cut off
                lines.write("\n" + json.dumps([*point, digest(point)]) + "\n")
            values = milestones(file).values()
            if place in self.medians and not any(
                self.sign * (value - self.medians[place]) <= 0 for value in values
            ):
                raise RunFailed(
                    f"{PRUNED}after {part:.3g} of the budget its {self.objective} "
                    "was worse than the median of other trials"
                )

        return judge


def milestones(file: Path) -> dict[int, float]:
    """The values that a run's judge kept, by thousandths of the budget.

    Each line ends with the digest of its values; one that was cut off or damaged does not count.
    """
    found = {}
    for line in file.read_bytes().splitlines() if file.exists() else ():
        with suppress(ValueError, TypeError):
            *point, stated = parse_json(line.decode())
            if digest(point) == stated:
                place, value = point
                found[place] = value
    return found


class Tracking(BaseModel):
    """What follows the runs of a sweep.

    Attributes:
        name: the tracker's; None tracks nothing.
        group: the sweep's name there.
    """

    model_config = ConfigDict(frozen=True)

    name: str | None = None
    group: str = ""


UNTRACKED = Tracking()


class Order(BaseModel):
    """One run for a child process.

    Attributes:
        config: with its budget in steps, which the driver has settled.
        results: the results folder, absolute.
        device: cpu or cuda.
        code: the driver's digest, so that an edit during a sweep mixes no two versions.
        reuse: take a finished record that other code made.
        name: what a child that shares a terminal puts before its lines.
        pruning: when to give the run up.
        tracking: what follows the run.
    """

    model_config = ConfigDict(frozen=True)

    config: RunConfig
    results: Path
    device: str
    code: str
    reuse: bool = False
    name: str = ""
    pruning: Pruning | None = None
    tracking: Tracking = UNTRACKED

    def execute(self, device: torch.device, report: Report, follower: Follower = NOBODY) -> Record:
        """Makes the run; waits for another process that makes it.

        Raises as `Run.execute`, and UsageError if the code is not the driver's.
        """
        if self.code != code_digest():
            raise UsageError(
                "the code was changed since the sweep began, or differs between machines: "
                "start the sweep again"
            )
        resolved = resolve(self.config, results=self.results, device=device)
        run = Run(resolved, self.results, device, report, follower=follower)
        if self.pruning is not None:
            run.judge = self.pruning.judge(run.folder / MILESTONES_FILE)
        return run.execute(self.reuse, wait=True)


def job_of(
    config: RunConfig,
    resolved: Resolved,
    results: Path,
    device: torch.device,
    reuse: bool = False,
    name: str = "",
    pruning: Pruning | None = None,
    tracking: Tracking = UNTRACKED,
) -> Job:
    """The child process that makes a run."""
    settled: dict[str, object] = {"noise_sets": resolved.noise_sets}
    if resolved.settings.total_steps:
        settled["budget"] = f"steps={resolved.settings.total_steps}"
    order = Order(
        config=config.model_copy(update=settled),
        results=results.resolve(),
        device=device.type,
        code=code_digest(),
        reuse=reuse,
        name=name,
        pruning=pruning,
        tracking=tracking,
    )
    plugins = [word for path in PLUGIN_SOURCES for word in ("--plugin", str(path))]
    return Job(("_job", order.model_dump_json(), *plugins))


def stop_with_driver() -> None:
    """Sends this process SIGTERM when its stdin closes, which happens when its driver ends."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
