"""Image sets: the split of the digits, and rounding to 8 bits."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from harness.data.images import Split, digits, load_split, to_uint8
from harness.errors import UsageError


@pytest.fixture(scope="module")
def split() -> Split:
    """The digits under seed 0."""
    return digits(0)


def test_sizes_shapes_and_range(split: Split) -> None:
    for part, size in ((split.train, 1437), (split.held_out, 360)):
        assert len(part) == size
        assert part.images.shape == (size, 1, 8, 8)
        assert part.images.dtype == torch.float32
        assert part.labels.shape == (size,)
        assert part.labels.dtype == torch.int64
        assert (part.images.min(), part.images.max()) == (-1, 1)


def test_the_parts_are_the_whole_set_with_its_labels(split: Split) -> None:
    source = load_digits()
    images = torch.cat([split.train.images, split.held_out.images])
    labels = torch.cat([split.train.labels, split.held_out.labels])
    found = sorted((*image.flatten().tolist(), label) for image, label in zip(images, labels.tolist(), strict=True))
    expected = sorted((*(image.flatten() / 8 - 1).tolist(), label) for image, label in zip(source.images, source.target, strict=True))
    assert found == expected


def test_the_split_is_stratified(split: Split) -> None:
    train, held_out = (part.labels.bincount(minlength=10) for part in (split.train, split.held_out))
    assert ((train + held_out) * 0.2 - held_out).abs().max() <= 1


def test_the_split_depends_on_its_seed_alone(split: Split) -> None:
    assert torch.equal(digits(0).train.images, split.train.images)
    assert not torch.equal(digits(1).train.images, split.train.images)


def test_a_batch_pairs_images_with_their_labels(split: Split) -> None:
    images, cond = split.train.batch(torch.tensor([5, 0]))
    assert torch.equal(images, split.train.images[[5, 0]])
    assert torch.equal(cond.labels, split.train.labels[[5, 0]])


def test_rounding_to_8_bits() -> None:
    values = torch.tensor([-1, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, -0.5, 0.5, 1 - 0.51 / 127.5, 1 - 0.49 / 127.5, 1, -7, 7])
    found = to_uint8(values)
    assert found.dtype == torch.uint8
    assert found.tolist() == [0, 0, 1, 64, 191, 254, 255, 255, 0, 255]


def test_every_8_bit_value_survives() -> None:
    values = torch.arange(256)
    assert torch.equal(to_uint8(values / 127.5 - 1), values.to(torch.uint8))


def test_an_unknown_set_lists_the_near_ones() -> None:
    with pytest.raises(UsageError, match="unknown image set 'digit'; did you mean digits"):
        load_split("digit", 0)
