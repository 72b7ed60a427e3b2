"""The latency protocol on a fake clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from harness.metrics import latency
from harness.metrics.latency import Latency, interleaved_latency


class Clock:
    """A clock that moves only when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def worker(self, name: str, seconds: list[float]) -> Callable[[], None]:
        def work() -> None:
            self.now += seconds[self.calls.count(name) % len(seconds)]
            self.calls.append(name)

        return work


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock.now)
    return clock


def test_runs_and_reference_take_turns_after_the_warm_up(clock: Clock) -> None:
    interleaved_latency(
        clock.worker("run", [1.0]),
        clock.worker("reference", [2.0]),
        torch.device("cpu"),
        warmup=2,
        repeats=3,
    )
    assert clock.calls == ["run", "reference"] * 5


def test_medians_of_the_timed_repeats(clock: Clock) -> None:
    run = clock.worker("run", [100.0, 1.0, 2.0, 9.0])  # the first is the warm-up
    reference = clock.worker("reference", [100.0, 1.0, 4.0, 3.0])
    found = interleaved_latency(run, reference, torch.device("cpu"), warmup=1, repeats=3)
    # The ratios of the pairs are 1, 1/2 and 3.
    assert found == Latency(seconds=2.0, reference_seconds=3.0, ratio=1.0)
