"""MACs and FLOPs against closed formulas, another counter, and the papers' figures."""

from __future__ import annotations

from typing import Any

import fvcore.nn as fvcore
import pytest
import torch
from formulas import cross_attention_macs, dit_macs, history_extra_macs, text_macs
from torch import nn

from harness.diffusion.conditions import Condition
from harness.metrics.compute import count_flops, count_macs, macs_by_kind, parameters
from harness.networks.backbones.dit import DiT, size_options
from harness.networks.history import EMPTY, History, with_history
from harness.networks.masks import causal, keep_first, window

SMALL = {
    "image_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 32,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 5,
}
XL = {
    **size_options("DiT-XL/2"),
    "image_size": 32,
    "in_channels": 4,
    "num_classes": 1000,
    "learn_sigma": True,
}


def forward_macs(options: dict[str, Any], device: str, batch: int = 1) -> int:
    with torch.device(device):
        network = DiT(**options).to(device)  # position embeddings are made by numpy
        x = torch.zeros(batch, options["in_channels"], options["image_size"], options["image_size"])
        t, labels = torch.zeros(batch), torch.zeros(batch, dtype=torch.long)
    with torch.no_grad():
        return count_macs(lambda: network(x, t, Condition(labels)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learn_sigma": True},
        {"image_size": 16, "depth": 2},
        {"hidden_size": 64, "patch_size": 4},
    ],
)
def test_a_dits_macs_are_those_of_its_layers(changes: dict[str, Any], device: str) -> None:
    options = {**SMALL, **changes}
    assert forward_macs(options, device) == dit_macs(**options)
    assert forward_macs(options, device, batch=3) == 3 * dit_macs(**options)


def test_dit_xl_2_at_256_pixels_has_the_papers_figure() -> None:
    found = forward_macs(XL, "meta")
    assert found / 1e9 == pytest.approx(118.62, abs=0.02)
    assert found == dit_macs(**XL)


def sampling_macs(
    history_layers: int, states: int, options: dict[str, Any] = SMALL, device: str = "cpu"
) -> int:
    """Multiply-adds of cached sampling, one sample."""
    with torch.device(device):
        network = with_history(DiT(**options), states, history_layers).to(device)
        x = torch.zeros(1, 1, options["in_channels"], options["image_size"], options["image_size"])
        t, labels = torch.zeros(1, 1), torch.zeros(1, dtype=torch.long)

    def sample() -> None:
        cache = EMPTY
        for _ in range(states):
            _, cache = network(x, t, Condition(labels), cache)

    with torch.no_grad():
        return count_macs(sample)


@pytest.mark.parametrize("history_layers", range(5))
def test_history_costs_what_the_formula_says(history_layers: int) -> None:
    extra = sampling_macs(history_layers, 4) - sampling_macs(0, 4)
    assert extra == history_extra_macs(16, 32, history_layers, [1, 2, 3, 4])
    assert extra == 2 * 16**2 * 32 * history_layers * (0 + 1 + 2 + 3)
    assert sampling_macs(0, 4) == 4 * dit_macs(**SMALL)


@pytest.mark.parametrize(("history_layers", "percent"), [(6, 1.15), (28, 5.35)])
def test_ards_extra_compute_is_the_papers(history_layers: int, percent: float) -> None:
    base, extra = 4 * dit_macs(**XL), history_extra_macs(256, 1152, history_layers, [1, 2, 3, 4])
    assert 100 * extra / base == pytest.approx(percent, abs=0.005)
    assert sampling_macs(history_layers, 4, XL, "meta") - base == extra


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("history_layers", [0, 3])
def test_a_text_costs_its_keys_once_and_its_products_in_each_step(
    history_layers: int, device: str
) -> None:
    length, text_width, tokens, width, depth = 7, 5, 16, 32, 4
    with torch.device(device):
        network = with_history(DiT(**SMALL, text_width=text_width), 3, history_layers).to(device)
        x, t, text = torch.zeros(2, 1, 3, 8, 8), torch.zeros(2, 1), torch.zeros(2, 7, 5)
        cond = Condition(torch.zeros(2, dtype=torch.long), text).keeping()

    def sample() -> None:
        cache = EMPTY
        for _ in range(3):
            _, cache = network(x, t, cond, cache)

    with torch.no_grad():
        found = macs_by_kind(sample)
    assert sum(found.values()) == 2 * (
        3 * dit_macs(**SMALL)
        + history_extra_macs(tokens, width, history_layers, [1, 2, 3])
        + 3 * cross_attention_macs(tokens, length, width, depth)
        + text_macs(length, text_width, width, depth)
    )
    keys = depth * length * text_width * 2 * width
    products = 3 * cross_attention_macs(tokens, length, width, depth)
    assert found["cross-attention"] == 2 * (products + keys)
    assert found["other"] == 0


def test_attention_is_counted() -> None:
    q = torch.zeros(2, 4, 16, 8)
    macs = count_macs(lambda: nn.functional.scaled_dot_product_attention(q, q, q))
    assert macs == 2 * 2 * 4 * 16 * 16 * 8


def test_a_backward_pass_is_counted() -> None:
    layer, x = nn.Linear(6, 5), torch.zeros(3, 6)
    expected = 2 * (2 * 3 * 6 * 5)  # the forward pass and the weight's gradient
    assert count_flops(lambda: layer(x).sum().backward()) == expected
    x.requires_grad_()
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * (2 * 3 * 6 * 5)


class CachedSampling(nn.Module):
    """S steps of a history student, as one module that fvcore can trace."""

    def __init__(self, network: History):
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        cache = EMPTY
        for _ in range(self.network.num_states):
            x, cache = self.network(x, t, Condition(labels), cache)
        return x


class Labelled(nn.Module):
    """A network that takes labels, as tracing needs tensors."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.network(x, t, Condition(labels))


def fvcore_macs(module: nn.Module, inputs: tuple[Any, ...], attention: bool = True) -> int:
    """MACs that fvcore counts, with attention or without."""

    def products(inputs: list[Any], outputs: list[Any]) -> int:
        batch, heads, queries, width = inputs[0].type().sizes()
        return 2 * batch * heads * queries * inputs[1].type().sizes()[2] * width

    analysis = (
        fvcore.FlopCountAnalysis(module, inputs)
        .unsupported_ops_warnings(False)
        .tracer_warnings("none")
    )
    if attention:
        analysis.set_op_handle("aten::scaled_dot_product_attention", products)
    # layer_norm is no matrix product.
    return sum(macs for name, macs in analysis.by_operator().items() if name != "layer_norm")


MASKS = {
    "causal": causal,
    "window 1": window(1),
    "window 2": window(2),
    "diagonal": window(0),
    "keep first": keep_first,
}


@pytest.mark.parametrize(
    "history_layers", [0, 2, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))]
)
@pytest.mark.parametrize("per_step_heads", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_three_counts_agree_for_every_mask_and_depth(
    mask: str, per_step_heads: bool, history_layers: int
) -> None:
    network = (
        with_history(DiT(**SMALL), 4, history_layers, MASKS[mask], per_step_heads)
        .eval()
        .requires_grad_(False)
    )
    inputs = (torch.zeros(1, 1, 3, 8, 8), torch.zeros(1, 1), torch.zeros(1, dtype=torch.long))
    formula = 4 * dit_macs(**SMALL) + history_extra_macs(
        16, 32, history_layers, [len(MASKS[mask](q)) for q in range(4)]
    )
    assert count_macs(lambda: CachedSampling(network)(*inputs)) == formula
    assert fvcore_macs(CachedSampling(network), inputs) == formula


def test_fvcore_skips_attention_unless_it_is_told() -> None:
    inputs = (torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    network = Labelled(DiT(**SMALL).eval())
    assert fvcore_macs(network, inputs) == 2 * dit_macs(**SMALL)
    assert (
        fvcore_macs(network, inputs, attention=False)
        == 2 * dit_macs(**SMALL) - 2 * 4 * 2 * 16**2 * 32
    )


def test_parameters_leave_out_position_embeddings() -> None:
    network = nn.Linear(3, 2)
    network.register_buffer("fixed", torch.zeros(100))
    assert parameters(network) == 3 * 2 + 2
    dit = DiT(**SMALL)
    assert parameters(dit) == sum(value.numel() for value in dit.state_dict().values()) - 16 * 32
