"""Sampling cost on the meta device: the paper's figures, the closed formula, and fvcore."""

from __future__ import annotations

import pytest
import torch
from formulas import history_extra_macs

from harness.errors import UsageError
from harness.methods import METHODS
from harness.networks.masks import causal, keep_first, window
from harness.runs.cost import SamplingCost, paper_problem, sampling_cost_on_meta


def cost(
    method: str, network: str = "DiT-XL/2", size: int = 256, num_steps: int = 4, **options: object
) -> SamplingCost:
    problem = paper_problem(network, size, True, 1000, num_steps)
    return sampling_cost_on_meta(method, METHODS[method].Config(**options), problem, num_steps)


@pytest.mark.slow
def test_the_papers_figures() -> None:
    base, six, all_layers = (cost("ard", history_layers=n) for n in (0, 6, 28))
    assert base.macs / 1e9 == pytest.approx(474.5, abs=0.05)
    assert base.extra == 0
    assert (six.macs - base.macs) / 1e9 == pytest.approx(5.44, abs=0.005)
    assert six.extra == pytest.approx(0.0115, abs=5e-5)
    assert all_layers.extra == pytest.approx(0.0535, abs=5e-5)
    blocks = sum(
        base.by_kind[kind] for kind in ("attention projections", "attention products", "MLP")
    )
    assert blocks / 1e9 == pytest.approx(473.5, abs=0.05)
    assert base.nfe == 4


@pytest.mark.parametrize(
    ("layers", "options", "visible"),
    [
        (12, {}, causal),
        (5, {"history_depth": 1}, window(1)),
        (1, {"history_depth": 2}, window(2)),
        (12, {"mask": "keep_first"}, keep_first),
    ],
)
def test_every_mask_and_depth_equals_the_closed_formula(
    layers: int, options: dict, visible: object
) -> None:
    found = cost("ard", "DiT-S/8", 64, history_layers=layers, **options)
    seen = [len(visible(q)) for q in range(4)]  # type: ignore[operator]
    tokens, width = (64 // 8 // 8) ** 2, 384
    assert found.macs - found.plain_macs == history_extra_macs(tokens, width, layers, seen)


def test_kinds_add_up() -> None:
    found = cost("ard", "DiT-S/4", 128, history_layers=3)
    assert sum(found.by_kind.values()) == found.macs
    assert found.by_kind["other"] == 0


def test_a_training_free_sampler_is_counted_the_same_way() -> None:
    found = cost("teacher", "DiT-S/8", 64, num_steps=5, solver="heun")
    assert found.nfe == 9
    assert found.extra == 0


COUNTED = ("ard", "dmd2", "meanflow", "teacher")
"""Methods that every run counts; `tox -e slow` counts all."""


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[] if name in COUNTED else [pytest.mark.slow])
        for name in METHODS.names()
    ],
)
def test_any_method_is_counted_without_weights(method: str) -> None:
    steps = METHODS[method].default_num_steps
    problem, cls = paper_problem("DiT-S/8", 64, True, 1000, steps), METHODS[method]
    options = {"history_layers": 6} if method == "ard" else {}
    found = sampling_cost_on_meta(method, cls.Config(**options), problem, steps)
    assert found.nfe == steps
    assert found.parameters > 3e7
    # With only 16 tokens, embedding one more number costs a visible share.
    assert 0 <= found.extra < 0.1
    assert torch.nn.Linear(1, 1).weight.device.type == "cpu"


@pytest.mark.parametrize(
    ("network", "size", "message"),
    [("DiT-XM/2", 256, "did you mean"), ("DiT-S/2", 250, "must be a multiple of 16")],
)
def test_sizes_that_do_not_exist(network: str, size: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        paper_problem(network, size, True, 1000, 4)
