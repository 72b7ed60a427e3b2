"""Seconds of sampling with and without history on this machine, for docs/resolution.md."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.ab import compare
from benchmarks.resolution import STEPS, table, tokens_of
from harness.diffusion.denoiser import Denoiser, Guided
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.methods import METHODS
from harness.networks.backbones import build
from harness.runs.cost import paper_problem, sampling_cost_on_meta
from harness.solvers import sample

NETWORK, LAYERS = "DiT-S/2", 6
SIZES = {256: 9, 512: 7}
"""Pairs of runs, by size."""

TEXT = """
## Latency

Measured on {threads} thread of a shared CPU with {network} ({layers} of its 12 layers with
history), one sample, pairs of runs in turn. The ratio is the median of the pairs, with its
interval. Nothing larger was timed, and no GPU: latencies there are unmeasured.

{rows}
"""


def sampler(method: str, size: int) -> Callable[[], Tensor]:
    """A call that samples one image with an untrained student."""
    problem = paper_problem(NETWORK, size, True, 1000, STEPS)
    config = METHODS[method].Config(**({"history_layers": LAYERS} if method == "ard" else {}))
    with keyed_initialisation(0, method):
        denoiser = Denoiser(build(problem.network_options), problem.schedule, "eps")
        student = METHODS[method](config, Guided(denoiser, 1.0, problem.null), problem, STEPS, 1)
    x, cond = Keyed("latency", 0).normal("x", torch.arange(1), problem.shape), problem.null

    @torch.no_grad()
    def call() -> Tensor:
        return sample(student.solver, student.student, x, student.levels, cond, lambda name: x)

    return call


def latencies() -> str:
    """The section of the page."""
    torch.set_num_threads(1)
    rows = []
    for size, pairs in SIZES.items():
        ratio = compare(sampler("step-distillation", size), sampler("ard", size), pairs)
        problem = paper_problem(NETWORK, size, True, 1000, STEPS)
        config = METHODS["ard"].Config.model_validate({"history_layers": LAYERS})
        extra = sampling_cost_on_meta("ard", config, problem, STEPS).extra
        seconds = [f"{each:.2f} s" for each in ratio.seconds]
        rows.append(
            [f"{size} px", f"{tokens_of(size):,}", *seconds, str(ratio), f"{1 + extra:.3f}"]
        )
    head = ["image", "tokens", "step distillation", "ARD", "ratio of times", "ratio of MACs"]
    return TEXT.format(threads=1, network=NETWORK, layers=LAYERS, rows=table(head, rows))
