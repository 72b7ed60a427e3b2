"""How threads should wait: `python -m benchmarks.threads [ROUNDS]` prints a table.

It times training steps, idle and beside a busy process. Each row is a process of its own, because
libgomp reads its settings when torch is imported. Rounds go through the rows in turn. Programs beside
it only ever add time, so "idle" is the shortest step of all rounds, and "busy" the lowest median of a
round.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

CORES = len(os.sched_getaffinity(0))
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SETTINGS: dict[str, dict[str, str]] = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    f"{CORES} threads, as torch starts them": {"OMP_NUM_THREADS": str(CORES)},
    **{f"{CORES} threads, GOMP_SPINCOUNT={spins}": {"OMP_NUM_THREADS": str(CORES), "GOMP_SPINCOUNT": str(spins)}
       for spins in (20_000, 5_000, 1_000)},
    f"{CORES} threads, OMP_WAIT_POLICY=passive": {"OMP_NUM_THREADS": str(CORES), "OMP_WAIT_POLICY": "passive"},
}  # fmt: skip
STEPS = 5
SPIN = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
"""Keeps a core busy, and ends with the benchmark even if that is killed."""


class Busy:
    """A process that keeps one core busy."""

    def __enter__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", SPIN])
        time.sleep(0.5)

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()


def serve() -> None:
    """For each line on stdin, times steps of step distillation on digits, batch 64.

    Prints their seconds as a JSON list.
    """
    import torch

    from harness.methods import METHODS
    from harness.tasks import load_task
    from harness.training.estimate import rehearsal
    from harness.training.settings import TrainSettings

    config = METHODS["step-distillation"].Config()
    trainer = rehearsal("step-distillation", config, load_task("digits"), 4, TrainSettings(10**6, 64, 0), torch.device("cpu"))
    trainer.train(until=2)
    print("ready", flush=True)
    for _ in sys.stdin:
        seconds = []
        for _ in range(STEPS):
            start = time.perf_counter()
            trainer.train(until=trainer.step + 1)
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


def started(setting: dict[str, str]) -> subprocess.Popen[str]:
    """A process that serves under a setting."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | setting
    command = [sys.executable, "-m", "benchmarks.threads", "serve"]
    child = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    answer(child)
    return child


def timed(child: subprocess.Popen[str]) -> list[float]:
    """Seconds of some steps of a child."""
    assert child.stdin is not None
    child.stdin.write("go\n")
    child.stdin.flush()
    return list(json.loads(answer(child)))


def answer(child: subprocess.Popen[str]) -> str:
    """The next line of a child. Raises RuntimeError if it ended."""
    assert child.stdout is not None
    if not (line := child.stdout.readline()):
        raise RuntimeError(f"a timed process ended with exit code {child.wait()}")
    return line


def main(rounds: int) -> None:
    """Prints the table."""
    children = {name: started(setting) for name, setting in SETTINGS.items()}
    idle: dict[str, list[float]] = {name: [] for name in SETTINGS}
    busy: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(rounds):
        for name, child in children.items():
            idle[name].append(min(timed(child)))
        with Busy():
            for name, child in children.items():
                busy[name].append(statistics.median(timed(child)))
    for child in children.values():
        child.communicate()
    print(f"{CORES} cores, load average {os.getloadavg()[0]:.1f}\n")
    print("| seconds a step | idle | beside one busy process |\n|---|---|---|")
    for name in SETTINGS:
        print(f"| {name} | {min(idle[name]):.2f} | {min(busy[name]):.2f} |")


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 5)
