"""Latency after warm-up, synchronised and interleaved with a reference: medians and their ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Latency:
    """Medians over interleaved repeats.

    Attributes:
        seconds, reference_seconds: median seconds of the run and of the reference.
        ratio: median over the repeats of run / reference.
    """

    seconds: float
    reference_seconds: float
    ratio: float


def interleaved_latency(
    run: Callable[[], Any],
    reference: Callable[[], Any],
    device: torch.device,
    *,
    warmup: int = 2,
    repeats: int = 9,
) -> Latency:
    """Times `run` and `reference` in turn, so that both see the same state of the machine."""

    def seconds(call: Callable[[], Any]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for _ in range(warmup):
        run(), reference()
    pairs = [(seconds(run), seconds(reference)) for _ in range(repeats)]
    mine, theirs = zip(*pairs, strict=True)
    return Latency(
        statistics.median(mine),
        statistics.median(theirs),
        statistics.median(a / b for a, b in pairs),
    )
