"""Keyed randomness: known answers, independence of batching, dependence on keys, distribution."""

from __future__ import annotations

import pytest
import torch
from elsewhere import elsewhere
from scipy import stats
from torch import nn

from harness.diffusion.randomness import Keyed, keyed_initialisation, philox

INDEX = torch.arange(10)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers(counter: str, key: str, answer: str) -> None:
    """Random123's `kat_vectors` for philox4x32 with ten rounds; two counters at once."""
    words = [torch.full((2,), int(word, 16)) for word in counter.split()]
    first, second = (int(word, 16) for word in key.split())
    for word, expected in zip(philox(words, (first, second)), answer.split(), strict=True):
        assert word.tolist() == [int(expected, 16)] * 2


@pytest.mark.parametrize("shape", [(3,), (2, 3, 3)])
def test_a_batch_in_parts_is_the_batch(shape: tuple[int, ...]) -> None:
    keyed = Keyed("test", 1, 2)
    for draw in (keyed.normal, keyed.uniform):
        whole = draw("x", INDEX, shape)
        assert whole.shape == (10, *shape)
        assert torch.equal(
            whole, torch.cat([draw("x", INDEX[:3], shape), draw("x", INDEX[3:], shape)])
        )


def test_the_order_of_samples_does_not_matter() -> None:
    keyed = Keyed("test", 0)
    assert torch.equal(
        keyed.normal("x", INDEX.flip(0), (4,)), keyed.normal("x", INDEX, (4,)).flip(0)
    )


def test_numbers_are_drawn_on_the_device_of_the_indices() -> None:
    keyed = Keyed("test", 0)
    with elsewhere() as device:
        there = keyed.normal("x", INDEX.to(device), (4,))
        assert there.device == device
        assert torch.equal(there.cpu(), keyed.normal("x", INDEX, (4,)))


def test_numbers_are_the_same_again() -> None:
    assert torch.equal(
        Keyed("test", 3, 4).normal("x", INDEX, (5,)), Keyed("test", 3, 4).normal("x", INDEX, (5,))
    )


@pytest.mark.parametrize(
    ("purpose", "seed", "step", "name"),
    [
        ("other", 1, 23, "x"),
        ("test", 2, 23, "x"),
        ("test", 1, 24, "x"),
        ("test", 1, 23, "y"),
        ("test", 12, 3, "x"),
        ("test", -1, 23, "x"),
    ],
)
def test_numbers_depend_on_every_part_of_the_key(
    purpose: str, seed: int, step: int, name: str
) -> None:
    here, there = Keyed("test", 1, 23), Keyed(purpose, seed, step)
    assert not torch.isin(there.uniform(name, INDEX, (8,)), here.uniform("x", INDEX, (8,))).any()
    assert not torch.isin(there.normal(name, INDEX, (8,)), here.normal("x", INDEX, (8,))).any()


def test_no_two_samples_share_a_number() -> None:
    index = torch.tensor([0, 1, 2, 2**32, 2**32 + 1, 2**40])
    numbers = Keyed("test", 0).uniform("x", index, (50,))
    assert len(numbers.unique()) == 300


def test_uniforms_are_uniform() -> None:
    numbers = Keyed("test", 0).uniform("x", torch.arange(200), (101,)).flatten()
    assert numbers.dtype == torch.float64
    assert numbers.min() > 0
    assert numbers.max() < 1
    assert stats.kstest(numbers, "uniform").pvalue > 0.01
    assert Keyed("test", 0).uniform("x", INDEX).shape == (10,)


def test_normals_are_normal() -> None:
    numbers = Keyed("test", 0).normal("x", torch.arange(400), (3, 5, 7))
    assert numbers.dtype == torch.float32
    flat = numbers.flatten().double()
    moments = [float((flat**power).mean()) for power in (1, 2, 3, 4)]
    error = [(variance / len(flat)) ** 0.5 for variance in (1, 2, 15, 96)]  # of the mean of z^power
    for moment, expected, standard_error in zip(moments, (0, 1, 0, 3), error, strict=True):
        assert abs(moment - expected) < 3 * standard_error
    assert stats.kstest(flat, "norm").pvalue > 0.01


def test_normals_are_independent_within_and_between_samples() -> None:
    numbers = Keyed("test", 0).normal("x", torch.arange(4000), (16,)).double()
    joined = torch.cat([numbers[:-1], numbers[1:]], 1).T  # a sample and the next one
    for correlation in (torch.corrcoef(joined), torch.corrcoef(joined**2)):
        assert (correlation - torch.eye(32)).abs().max() < 5 / 4000**0.5


def test_a_permutation_holds_every_item_once() -> None:
    keyed = Keyed("test", 0)
    order = keyed.permutation("x", 50)
    assert sorted(order.tolist()) == list(range(50))
    assert not torch.equal(order, torch.arange(50))
    assert not torch.equal(order, keyed.permutation("y", 50))


def test_torchs_own_generator_does_not_move() -> None:
    before = torch.random.get_rng_state()
    keyed = Keyed("test", 0)
    keyed.normal("x", INDEX, (4,))
    keyed.uniform("x", INDEX, (4,))
    keyed.permutation("x", 10)
    assert torch.equal(torch.random.get_rng_state(), before)


def weights(seed: int, name: str) -> torch.Tensor:
    """Initial weights of a layer."""
    with keyed_initialisation(seed, name):
        return nn.Linear(5, 5).weight.detach()


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    first = weights(0, "net")
    torch.rand(1)
    assert torch.equal(weights(0, "net"), first)
    assert not torch.equal(weights(1, "net"), first)
    assert not torch.equal(weights(0, "other"), first)


def test_initialisation_puts_torchs_generator_back() -> None:
    before = torch.random.get_rng_state()
    weights(0, "net")
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(RuntimeError), keyed_initialisation(0, "net"):
        torch.rand(2) @ torch.rand(3)
    assert torch.equal(torch.random.get_rng_state(), before)
