"""Forward-mode derivatives, and what they are billed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.diffusion.counting import count_flops, jvp
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.networks.backbones.dit import DiT
from harness.training.tiny_task import NETWORK


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
