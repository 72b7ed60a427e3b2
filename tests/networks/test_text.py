"""The text encoder, the network that has one, and PixArt's modulation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness.diffusion.conditions import Condition
from harness.diffusion.randomness import keyed_initialisation
from harness.networks.backbones import build
from harness.networks.backbones.dit import DiT
from harness.networks.text import LONGEST, TextEncoder, padded

SIZES = {"words": 9, "width": 8, "depth": 2, "num_heads": 2}
NETWORK = {
    "image_size": 8,
    "patch_size": 4,
    "in_channels": 3,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "text_width": 8,
}


@pytest.fixture
def encoder() -> TextEncoder:
    with keyed_initialisation(0, "text"):
        return TextEncoder(**SIZES).double()


def test_padding_has_no_effect(encoder: TextEncoder) -> None:
    sentences = [[0, 3, 5], [8], [1, 2, 3, 4, 5, 6]]
    tokens, mask = padded(sentences)
    together = encoder(tokens, mask)
    for row, sentence in enumerate(sentences):
        alone = encoder(*padded([sentence]))[0]
        torch.testing.assert_close(together[row, : len(sentence) + 1], alone, rtol=1e-12, atol=0)


def test_the_order_of_words_counts(encoder: TextEncoder) -> None:
    """As much as another word does, before any training."""
    with torch.no_grad():
        first, swapped, word = (encoder(*padded([w]))[0] for w in ([1, 2], [2, 1], [1, 3]))
    by_order, by_word = (float((first[0] - swapped[1]).norm()), float((first - word)[1].norm()))
    assert by_order > 0.3 * by_word


def test_a_sentence_may_have_76_words() -> None:
    tokens, mask = padded([[0] * (LONGEST - 1), []])
    assert tokens.shape == (2, LONGEST)
    assert mask.sum(1).tolist() == [LONGEST, 1]
    with pytest.raises(ValueError, match="77 words, but at most 76"):
        padded([[0] * LONGEST])


def test_a_network_with_an_encoder_is_the_two_in_turn() -> None:
    with keyed_initialisation(0, "both"):
        network = build({"backbone": "prompted", "encoder": SIZES, "network": NETWORK})
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    tokens, mask = padded([[1, 2], [3]])
    x, time = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 500.0])
    cond = Condition(text=tokens, text_mask=mask)
    read = replace(cond, text=network.encoder(tokens, mask))
    torch.testing.assert_close(network(x, time, cond), network.network(x, time, read))
    tokens_of, vector = network.features(x, time, cond, 1)
    assert len(list(tokens_of)) == 1
    assert vector.shape == (2, 16)
    output, _ = network.reuse(x, time, cond, 1)
    torch.testing.assert_close(output, network(x, time, cond))
    network(x, time, cond).square().mean().backward()
    assert all(p.grad is not None for p in network.encoder.layers.parameters())


def test_a_shared_modulation_is_that_of_blocks_with_equal_weights() -> None:
    with keyed_initialisation(0, "single"):
        single, block = DiT(**NETWORK, adaln="single"), DiT(**NETWORK)
        for parameter in single.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    single, block = single.double(), block.double()
    state = single.state_dict()
    shared = {name: state.pop(f"adaLN_modulation.1.{name}") for name in ("weight", "bias")}
    for i in range(2):
        table = state.pop(f"blocks.{i}.adaLN_modulation.table")
        state[f"blocks.{i}.adaLN_modulation.1.weight"] = shared["weight"]
        state[f"blocks.{i}.adaLN_modulation.1.bias"] = shared["bias"] + table
    block.load_state_dict(state)
    x, time = torch.randn(3, 3, 8, 8).double(), torch.tensor([1.0, 500.0, 999.0]).double()
    cond = Condition(text=torch.randn(3, 4, 8).double())
    found = [network(x, time, cond) for network in (single, block)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert len(list(single.parameters())) < len(list(block.parameters())) + 2
