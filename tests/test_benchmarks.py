"""The benchmarks' own tools: intervals, and the naive pass, which computes what ours does."""

from __future__ import annotations

import time

import pytest
import torch
from click.testing import CliRunner

from benchmarks import ranks
from benchmarks.ab import compare
from benchmarks.naive import NaiveHistory, dense_mask
from harness.diffusion.conditions import Condition
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.networks.backbones import build
from harness.networks.history import with_history
from harness.networks.masks import causal, keep_first, window
from harness.training.tiny_task import NETWORK

SMALL = {**NETWORK, "num_classes": 5}


@pytest.mark.parametrize("visible", [causal, window(1), keep_first])
@pytest.mark.parametrize("history_layers", [0, 2, 3])
def test_the_naive_pass_is_the_same_function(visible: object, history_layers: int) -> None:
    with keyed_initialisation(0, "naive"):
        network = with_history(build(SMALL), 4, history_layers, visible)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    network = network.double()
    x = Keyed("test", 0).normal("x", torch.arange(2), (4, 1, 8, 8)).double()
    t, cond = (
        torch.tensor([[999.0, 749.0, 499.0, 249.0]]).expand(2, -1),
        Condition(torch.tensor([1, 3])),
    )
    torch.testing.assert_close(
        NaiveHistory(network)(x, t, cond), network(x, t, cond)[0], rtol=1e-10, atol=1e-10
    )


def test_the_dense_mask_of_two_blocks() -> None:
    network = with_history(build(SMALL), 2, 1)
    assert dense_mask(network, 2, 2, True).int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 1],
        [1, 1, 1, 1],
    ]
    assert dense_mask(network, 2, 1, False).int().tolist() == [[1, 0], [0, 1]]


def test_a_ratio_and_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    # A warm-up, then A B, B A, A B, ...
    lengths = iter([9, 9, 1, 2, 3, 1, 1, 2, 4, 1, 1, 2, 2, 1, 1, 2])

    def call() -> None:
        clock[0] += next(lengths)

    ratio = compare(lambda: call(), lambda: call(), pairs=7)
    assert ratio.median == 2
    assert (ratio.low, ratio.high) == (2, 4)
    assert ratio.seconds == (1, 2)


@pytest.mark.slow
def test_what_ranks_gain_is_a_table() -> None:
    done = CliRunner().invoke(ranks.main, ["--pairs", "2"])
    assert done.exit_code == 0, done.output
    assert done.output.count("\n| strong: 64 samples on 2 ranks") == 1
    assert done.output.count("\n| weak: 128 samples on 2 ranks") == 1
