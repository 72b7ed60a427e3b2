"""Forward-mode derivatives, and what they are billed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harness.diffusion.conditions import Condition
from harness.diffusion.counting import count_flops, jvp
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.networks.backbones.dit import DiT
from harness.training.tiny_task import NETWORK


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_counts_are_those_of_torchs_counter(mode: type) -> None:
    """Products, convolutions and attention, backward too; inference mode gives composite calls."""
    convolution, linear = nn.Conv2d(3, 4, 3), nn.Linear(6, 5)
    image, query = torch.randn(2, 3, 8, 8), torch.randn(2, 2, 7, 6)

    def run() -> None:
        with mode():
            seen = F.scaled_dot_product_attention(query, query, query)
            out = convolution(image).square().mean() + linear(seen).mean()
            out = out + torch.einsum("bhtd,bhsd->", query, seen) + torch.matmul(seen, seen.mT).sum()
        if out.requires_grad:
            out.backward()

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as torchs:
        run()
    assert count_flops(run) == torchs.get_total_flops() > 0


def test_forward_mode_equals_finite_differences_and_costs_three_forwards() -> None:
    options = {**NETWORK, "depth": 2, "num_classes": 3}
    with keyed_initialisation(0, "jvp"):
        network = DiT(**options, scalars=("target",)).double()  # type: ignore[arg-type]
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    x, slope = (
        Keyed("test", 0).normal(name, torch.arange(3), (1, 8, 8)).double()
        for name in ("x", "slope")
    )
    t = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64)
    labels = Condition(torch.arange(3))

    def function(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t * 10, Condition(labels.labels, None, {"target": 5 * t}))

    value, derivative = jvp(function, (x, t), (slope, torch.ones_like(t)))
    h = 1e-5
    with torch.no_grad():
        differences = (function(x + h * slope, t + h) - function(x - h * slope, t - h)) / (2 * h)
    torch.testing.assert_close(value, function(x, t))
    torch.testing.assert_close(derivative, differences, rtol=1e-5, atol=1e-5)
    forward = count_flops(lambda: function(x, t))
    assert count_flops(lambda: jvp(function, (x, t), (slope, torch.ones_like(t)))) == 3 * forward
