"""The time embedding: the paper's formula, and times that half precision does not round."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Denoiser
from harness.diffusion.randomness import keyed_initialisation
from harness.diffusion.schedules import VPSchedule
from harness.networks.backbones.dit import DiT
from harness.networks.layers import TimestepEmbedder, sinusoids
from harness.training.tiny_task import NETWORK

TIMES = torch.tensor([999.0, 749.0, 0.0, 1.0])


def in_bf16(embedder: TimestepEmbedder, t: Tensor) -> Tensor:
    """The embedding by bf16 weights of sines and cosines that were computed in float32."""
    return embedder.mlp(sinusoids(t).bfloat16())


def test_sines_and_cosines_are_the_papers() -> None:
    """Cosines first; frequency i is 10000^(-i / 128)."""
    found = sinusoids(torch.tensor([[999.0, 3.5]], dtype=torch.float64))
    assert found.shape == (1, 2, 256)
    for t, row in zip((999.0, 3.5), found[0], strict=True):
        angles = [t * 10000 ** (-i / 128) for i in range(128)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert row.tolist() == pytest.approx(expected, abs=1e-9)


def test_bf16_weights_see_the_times_of_float32() -> None:
    """bf16 itself rounds 999 to 1000 and 749 to 748."""
    assert TIMES.bfloat16().tolist() == [1000, 748, 0, 1]
    with keyed_initialisation(0, "test"):
        embedder = TimestepEmbedder(16).bfloat16()
    found = embedder(TIMES)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, in_bf16(embedder, TIMES))
    assert not torch.equal(found[:2], embedder(torch.tensor([1000.0, 748.0])))


def test_under_autocast_too() -> None:
    with keyed_initialisation(0, "test"):
        embedder = TimestepEmbedder(16)
    with torch.autocast("cpu", torch.bfloat16):
        found = embedder(TIMES)
    assert torch.equal(found, in_bf16(copy.deepcopy(embedder).bfloat16(), TIMES))


def test_float64_stays() -> None:
    """Of the weights or of the times."""
    with keyed_initialisation(0, "test"):
        embedder = TimestepEmbedder(16)
    exact = TIMES.double()
    assert torch.equal(embedder(exact), embedder.mlp(sinusoids(exact).float()))
    embedder.double()
    assert torch.equal(embedder(TIMES), embedder.mlp(sinusoids(exact)))


def test_a_network_in_bf16_conditions_on_times_and_scalars_of_float32() -> None:
    """Through a denoiser, whose images are in bf16."""
    with keyed_initialisation(0, "test"):
        network = DiT(**{**NETWORK, "num_classes": 0}, scalars=("target",))
        for parameter in network.scalar_embedders.parameters():
            torch.nn.init.normal_(parameter)
    network.bfloat16()
    cond = Condition().with_scalars(target=torch.tensor([749.0, 499.0]))
    seen: list[Tensor] = []
    network.final_layer.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    x = torch.zeros(2, 1, 8, 8, dtype=torch.bfloat16)
    Denoiser(network, VPSchedule())(x, torch.tensor([1.0, 0.75]), cond)
    target = network.scalar_embedders["target"]
    assert isinstance(target, TimestepEmbedder)
    expected = in_bf16(network.t_embedder, torch.tensor([999.0, 749.0]))
    assert torch.equal(seen[0], expected + in_bf16(target, torch.tensor([749.0, 499.0])))
