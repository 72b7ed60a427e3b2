"""The DiT: sizes and keys of the official one, adaLN-Zero at the start, patches in and out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.randomness import keyed_initialisation
from harness.networks.backbones.dit import DiT, size_options
from harness.networks.layers import sincos_position_embedding
from harness.training.tiny_task import NETWORK

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = {**NETWORK, "depth": 2, "num_classes": 3}


def official_keys(depth: int) -> set[str]:
    """State-dict keys of the official DiT at a depth, derived from the golden DiT of depth 2."""
    with safe_open(GOLDEN / "dit.safetensors", "pt") as file:
        golden = {key.removeprefix("dit.") for key in file.keys() if key.startswith("dit.")}  # noqa: SIM118
    block = {key.removeprefix("blocks.0.") for key in golden if key.startswith("blocks.0.")}
    rest = {key for key in golden if not key.startswith("blocks.")}
    return rest | {f"blocks.{i}.{key}" for i in range(depth) for key in block}


def test_xl_has_the_published_number_of_parameters_and_the_official_keys() -> None:
    with torch.device("meta"):
        network = DiT(
            32, in_channels=4, num_classes=1000, learn_sigma=True, **size_options("DiT-XL/2")
        )
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters == 674_834_720
    # The published 675.13 M include the fixed positions.
    assert parameters + network.pos_embed.numel() == 675_129_632
    assert set(network.state_dict()) == official_keys(28)


def test_sizes_are_those_of_the_paper() -> None:
    assert size_options("DiT-S/8") == {
        "depth": 12,
        "hidden_size": 384,
        "num_heads": 6,
        "patch_size": 8,
    }
    for name in ("DiT-XXL/2", "DiT-S/3", "DiT-S"):
        with pytest.raises(KeyError):
            size_options(name)


def forward(network: DiT, batch: int = 3) -> Tensor:
    """The network's output for some random images."""
    x = torch.randn(
        batch,
        1,
        *(p * g for p, g in zip((4, 4), network.grid, strict=True)),
        generator=torch.Generator().manual_seed(0),
    )
    return network(x, torch.tensor([0.0, 10.0, 999.0]), Condition(torch.tensor([0, 1, 3])))


def test_an_untrained_network_outputs_zero() -> None:
    with keyed_initialisation(0, "test"):
        network = DiT(**TINY)
    assert not forward(network).any()


@pytest.mark.parametrize("trained", ["blocks.0.adaLN_modulation", "blocks.1.adaLN_modulation"])
def test_an_untrained_block_is_the_identity(trained: str) -> None:
    """With an output layer that speaks, zero gates still let every token through as it came."""
    with keyed_initialisation(0, "test"):
        network = DiT(**TINY)
        torch.nn.init.normal_(network.final_layer.linear.weight)
    tokens = network.tokens(torch.randn(2, 1, 8, 8))
    c = torch.randn(2, 16)
    assert torch.equal(network.blocks[0](tokens, c, Condition()), tokens)
    torch.nn.init.ones_(network.get_parameter(f"{trained}.1.bias"))
    block = network.blocks[int(trained.split(".")[1])]
    assert not torch.allclose(block(tokens, c, Condition()), tokens)


def test_learned_variance_doubles_the_channels_of_a_rectangular_image() -> None:
    network = DiT(**{**TINY, "image_size": (8, 12)}, learn_sigma=True)
    assert forward(network).shape == (3, 2, 8, 12)
    assert forward(DiT(**TINY)).shape == (3, 1, 8, 8)


def test_output_tokens_go_back_to_their_patches() -> None:
    network = DiT(**{**TINY, "image_size": (8, 12), "in_channels": 2})
    image = torch.arange(2.0 * 3 * 2 * 8 * 12).reshape(2, 3, 2, 8, 12)
    # The last five dimensions become rows, columns, p, p, channels.
    patches = image.reshape(2, 3, 2, 2, 4, 3, 4).permute(0, 1, 3, 5, 4, 6, 2)
    assert torch.equal(network.image(patches.reshape(6, 6, 32)), image.flatten(0, 1))


def test_positions_of_a_rectangle_are_those_of_the_square_around_it() -> None:
    square = sincos_position_embedding(16, (4, 4)).reshape(4, 4, 16)
    assert torch.equal(sincos_position_embedding(16, (2, 3)), square[:2, :3].reshape(1, 6, 16))
    assert len(square.reshape(16, 16).unique(dim=0)) == 16
