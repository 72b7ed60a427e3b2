"""What this machine has: cores, how threads share them, and the arithmetic peak of a GPU."""

from __future__ import annotations

import os
import time
from pathlib import Path

PEAKS = {
    "H100 80GB HBM3": 989e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""Dense bf16 FLOPs a second by words in a card's name, from the makers' data sheets."""
STAT = Path("/proc/stat")
IDLE = slice(3, 5)
"""Columns of a line of /proc/stat: idle, and waiting for a disk."""
COUNTED = 8
"""Columns that add up to all time; the later ones are parts of the first."""
BUSY = 0.25
"""Cores in use by others from which a machine is busy."""


def configure_threads() -> None:
    """Says how threads wait for each other, unless the environment does.

    By default libgomp lets them spin for long: beside one busy process a training step on two cores
    takes up to ten times as long. On an idle machine they spin for a moment, on a busy one they
    sleep at once (the table is in benchmarks/README.md). libgomp reads the variables when torch is
    imported, so call this before.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        if busy_now(0.1) < BUSY:
            os.environ["GOMP_SPINCOUNT"] = "5000"
        else:
            os.environ["OMP_WAIT_POLICY"] = "passive"


def memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cores() -> set[int]:
    """Numbers of the cores on which this process may run."""
    return (
        os.sched_getaffinity(0)
        if hasattr(os, "sched_getaffinity")
        else set(range(os.cpu_count() or 1))
    )


def peak_flops(card: str) -> float | None:
    """Dense bf16 FLOPs a second of a card by its name; None for a card that `PEAKS` lacks."""
    return next((peak for words, peak in PEAKS.items() if words in card), None)


def busy_note(interval: float = 0.2) -> str:
    """A warning if other programs use at least a quarter of a core while this process sleeps."""
    busy = busy_now(interval)
    if busy < BUSY:
        return ""
    return f"; other programs use {busy:.1f} of {len(cores())} cores now, so it may take longer"


def busy_now(interval: float) -> float:
    """How many cores other programs use while this process sleeps for some seconds."""
    if not STAT.exists():
        return 0.0
    before = STAT.read_text()
    time.sleep(interval)
    return busy_cores(before, STAT.read_text(), cores())


def busy_cores(before: str, after: str, allowed: set[int]) -> float:
    """How many of the allowed cores were busy on average between two readings of /proc/stat."""
    return sum(_busy_share(before, after, f"cpu{core}") for core in allowed)


def _busy_share(before: str, after: str, core: str) -> float:
    first, last = (_ticks(text, core) for text in (before, after))
    spent = [new - old for old, new in zip(first, last, strict=True)]
    return 1 - sum(spent[IDLE]) / sum(spent) if sum(spent) else 0.0


def _ticks(text: str, core: str) -> list[int]:
    """The columns of a core: user, nice, system, idle, iowait, irq, softirq, steal."""
    line = next(line for line in text.splitlines() if line.split(maxsplit=1)[0] == core)
    return [int(word) for word in line.split()[1 : 1 + COUNTED]]
