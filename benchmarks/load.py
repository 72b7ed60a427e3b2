"""Many runs and many records: does a driver or a report grow, leak or slow down?

`python -m benchmarks.load sweep RUNS [--real]` makes a sweep of a small task with two workers, and
`python -m benchmarks.load report RECORDS` reports synthetic records. Both count CPU seconds, which
other programs disturb less than the clock. Without `--real` a child of the sweep leaves a record at
once, so that a thousand of them measure the driver alone.
"""

from __future__ import annotations

import itertools
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import psutil
import torch
import yaml

from harness.cli.cmd_report import rendered
from harness.records import Record, published_records, write_record
from harness.report.rows import load_records
from harness.sweeps.driver import Driver
from harness.sweeps.engines import Local
from harness.sweeps.sweep import Cell, expand, plan, run_sweep
from harness.training.tiny_task import tiny_spec

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
SOLVERS = ("ddim", "euler")
STAND_IN = """#!{python} -IS
import hashlib, json, os, sys
order = json.loads(sys.argv[4])
run_id = order["name"].split()[1]
folder = os.path.join(order["results"], "runs", run_id)
record = json.load(open({record!r})) | dict(run_id=run_id)
del record["sha256"]
text = json.dumps(record, sort_keys=True, separators=(",", ":"))
os.makedirs(folder)
with open(os.path.join(folder, "record.json"), "w") as file:
    json.dump(record | dict(sha256=hashlib.sha256(text.encode()).hexdigest()), file)
"""
"""A child that leaves the record of a run without making the run."""


@dataclass
class Grown:
    """What a driver holds after each of its runs.

    Attributes:
        seconds: CPU seconds of the driver itself.
        megabytes: resident memory.
        descriptors, threads: their numbers, the children's pipes included.
    """

    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def note(self, message: str) -> None:
        """Takes the numbers when a run is said to have ended."""
        if message.endswith(": starts"):
            return
        process = psutil.Process()
        self.seconds.append(time.process_time())
        self.megabytes.append(process.memory_info().rss / 1e6)
        self.descriptors.append(process.num_fds())
        self.threads.append(process.num_threads())


def tiny_cells(folder: Path, runs: int) -> list[Cell]:
    """Runs of the smallest task that train nothing: 8 samples, two solvers, 1, 2, ... steps."""
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    spec = tiny_spec(folder / "weights")
    spec["evaluation"] |= {"samples": 8, "kid_subset_size": 2, "noise_sets": 1}
    spec["budgets"] = {"quick": {"steps": 1, "noise_sets": 1}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(spec))
    steps = range(1, -(-runs // len(SOLVERS)) + 1)
    content = {
        "base": {"task": str(folder / "tiny.yaml"), "method": "teacher"},
        "axes": {"num_steps": list(steps), "options.solver": list(SOLVERS)},
    }
    return plan(expand(content, "load"), folder / "results", CPU)[:runs]


@contextmanager
def stand_ins(folder: Path, cell: Cell) -> Iterator[None]:
    """Inside, children leave a record of this cell's kind at once."""
    known = published_records(ROOT / "results")[0]
    given = {"task": cell.resolved.task.spec.name, "method": cell.resolved.method}
    write_record(folder / "record.json", known.model_copy(update=given))
    script = folder / "stand-in"
    text = STAND_IN.format(python=sys.executable, record=str(folder / "record.json"))
    script.write_text(text)
    script.chmod(0o700)
    with mock.patch.object(sys, "executable", str(script)):
        yield


def swept(folder: Path, runs: int, real: bool = False) -> Grown:
    """What a driver with two workers holds during a sweep. Raises AssertionError for a lost run."""
    cells, grown = tiny_cells(folder, runs), Grown()
    shares = [{"OMP_NUM_THREADS": "1", "HARNESS_CACHE": str(folder / "cache")}] * 2
    driver = Driver[Cell](Local(shares), 2)

    def made() -> list[Record]:
        return run_sweep(cells, folder / "results", CPU, driver, say=grown.note)

    if real:
        records = made()
    else:
        with stand_ins(folder, cells[0]):
            records = made()
    assert [record.run_id for record in records] == [cell.resolved.run_id for cell in cells]
    assert all(record.status == "finished" for record in records)
    assert not driver.lost
    return grown


def show_sweep(runs: int, real: bool) -> None:
    """Prints what a sweep costs its driver in the first and in the last tenth of the runs."""
    with tempfile.TemporaryDirectory() as folder:
        grown, part = swept(Path(folder), runs, real), max(1, runs // 10)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    print("| | first tenth | last tenth |\n|---|--:|--:|")
    for name, numbers, of in (
        ("driver, CPU ms a run", grown.seconds, lambda x: 1e3 * (x[-1] - x[0]) / (len(x) - 1)),
        ("resident MB at its end", grown.megabytes, lambda x: x[-1]),
        ("most descriptors", grown.descriptors, max),
        ("most threads", grown.threads, max),
    ):
        print(f"| {name} | {of(numbers[:part]):.1f} | {of(numbers[-part:]):.1f} |")
    print(f"\n{runs} runs; children took {children.ru_utime + children.ru_stime:.0f} s of CPU")


def synthetic(count: int) -> Iterator[Record]:
    """Copies of the published records of digits: three seeds of many learning rates."""
    known = [record for record in published_records(ROOT / "results") if record.task == "digits"]
    for number, record in zip(range(count), itertools.cycle(known), strict=False):
        variant, seed = divmod(number // len(known), 3)
        options = dict(record.options)
        if "lr" in options:
            options["lr"] *= 1 + variant / 100
        run_id = f"{record.method}-{record.config['num_steps']}-{number:010}"
        given = {"run_id": run_id, "options": options, "config": {**record.config, "seed": seed}}
        yield record.model_copy(update=given)


def show_report(count: int) -> None:
    """Prints the CPU seconds of each part of a report, and the memory."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder)
        print(f"| {count} records | CPU seconds |\n|---|--:|")
        print(f"| starting Python with the harness | {time.process_time():.1f} |")
        for record in synthetic(count):
            write_record(results / "runs" / record.run_id / "record.json", record)
        started = time.process_time()
        records = load_records(results)
        print(f"| reading | {time.process_time() - started:.1f} |")
        for form in ("markdown", "latex", "csv", "html"):
            started = time.process_time()
            text = rendered(form, records, results)
            seconds = time.process_time() - started
            print(f"| {form}, {len(text) / 1e6:.1f} MB | {seconds:.1f} |", flush=True)
    print(f"\nmost resident: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    if sys.argv[1] == "sweep":
        show_sweep(int(sys.argv[2]), "--real" in sys.argv)
    else:
        show_report(int(sys.argv[2]))
