"""Latency after warm-up, synchronised and interleaved with a reference: medians and their ratio."""

from __future__ import annotations

import statistics
import time
import warnings
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


def captured(run: Callable[[], Any], device: torch.device) -> Callable[[], None] | None:
    """A CUDA graph of a call, which runs without Python and without launching each kernel.

    Returns:
        The graph's replay; None on other devices, and for a call that waits for the device.
    """
    if device.type != "cuda":
        return None
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):  # libraries allocate their workspaces before the capture
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with warnings.catch_warnings(), torch.cuda.graph(graph):
            warnings.simplefilter("ignore")  # an empty graph after a failure
            run()
    except RuntimeError:
        return None
    finally:
        torch.cuda.synchronize(device)
    return graph.replay
