"""Prints what the benchmarks found as a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.ab import Ratio, matrix_rate

FOUND: list[str] = []


@pytest.fixture(scope="session")
def rate() -> float:
    """Multiply-adds a second of the machine's float32 matrix product."""
    return matrix_rate()


@pytest.fixture
def found(rate: float, benchmark: Any) -> Callable[..., None]:
    """Notes a ratio with its goal; MACs give the part of the matrix rate that each side reaches."""

    def note(name: str, ratio: Ratio, goal: str, macs: tuple[float, float] | None = None) -> None:
        # An empty round, so that pytest-benchmark stores the ratio in its extra_info.
        benchmark.pedantic(lambda: None, rounds=1)
        reached = ""
        if macs is not None:
            parts = (
                f"{m / 1e9:.1f} GMACs, {m / seconds / rate:.0%}"
                for m, seconds in zip(macs, ratio.seconds, strict=True)
            )
            reached = " / ".join(parts)
        a, b = ratio.seconds
        benchmark.extra_info |= {
            "ratio": ratio.median,
            "low": ratio.low,
            "high": ratio.high,
            "goal": goal,
        }
        FOUND.append(
            f"| {name} | {ratio} | {goal} | {a:.3g} / {b:.3g} | {reached} | {ratio.pairs} |"
        )

    return note


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not FOUND:
        return
    threads = torch.get_num_threads()
    terminalreporter.write_line(
        f"\n{threads} threads, float32, matrix product of 1024: {matrix_rate() / 1e9:.0f} GMACs/s\n"
    )
    for line in (
        "| B over A | ratio [interval] | goal | seconds A / B "
        "| MACs and part of the matrix rate, A / B | pairs |",
        "|---|---|---|---|---|---|",
        *FOUND,
    ):
        terminalreporter.write_line(line)
