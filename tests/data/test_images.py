"""Image sets: the split of the digits, and rounding to 8 bits."""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request

import pytest
import torch
from click.testing import CliRunner
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.datasets import FashionMNIST

from harness.cli.main import main
from harness.data.images import Split, digits, to_uint8
from harness.data.sets import Wanted, load_split
from harness.errors import UsageError
from harness.files import data_folder

FASHION = Wanted("fashion-mnist", (1, 28, 28), 10)


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
    found = sorted(
        (*image.flatten().tolist(), label)
        for image, label in zip(images, labels.tolist(), strict=True)
    )
    expected = sorted(
        (*(image.flatten() / 8 - 1).tolist(), label)
        for image, label in zip(source.images, source.target, strict=True)
    )
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
    values = torch.tensor(
        [
            -1,
            -1 + 0.49 / 127.5,
            -1 + 0.51 / 127.5,
            -0.5,
            0.5,
            1 - 0.51 / 127.5,
            1 - 0.49 / 127.5,
            1,
            -7,
            7,
        ]
    )
    found = to_uint8(values)
    assert found.dtype == torch.uint8
    assert found.tolist() == [0, 0, 1, 64, 191, 254, 255, 255, 0, 255]


def test_every_8_bit_value_survives() -> None:
    values = torch.arange(256)
    assert torch.equal(to_uint8(values / 127.5 - 1), values.to(torch.uint8))


def test_an_unknown_set_lists_the_near_ones() -> None:
    with pytest.raises(UsageError, match="unknown image set 'digit'; did you mean digits"):
        load_split(Wanted("digit", (1, 8, 8), 10))


def write_fashion(folder: Path, train: int, held_out: int) -> dict[str, Tensor]:
    """Files as Fashion-MNIST has them, with images that are made up; returns these."""
    raw, made = folder / "FashionMNIST" / "raw", {}
    raw.mkdir(parents=True)
    for name, count in (("train", train), ("t10k", held_out)):
        images = (torch.arange(count * 784) * 7 % 256).to(torch.uint8).view(count, 28, 28)
        labels = (torch.arange(count) % 10).to(torch.uint8)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(
            struct.pack(">iiii", 2051, count, 28, 28) + bytes(images.flatten().tolist())
        )
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(
            struct.pack(">ii", 2049, count) + bytes(labels.tolist())
        )
        made[name] = images
    return made


def test_fashion_mnist_as_torchvision_lays_it_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write_fashion(tmp_path / "data", 30, 20)
    monkeypatch.setenv("HARNESS_DATA", str(tmp_path / "data"))
    split = load_split(FASHION)
    for part, name, count in ((split.train, "train", 30), (split.held_out, "t10k", 20)):
        assert part.images.shape == (count, 1, 28, 28)
        assert (part.images.min(), part.images.max()) == (-1, 1)
        assert torch.equal(to_uint8(part.images).squeeze(1), made[name])  # nothing is lost
        assert part.labels.tolist() == [i % 10 for i in range(count)]


def test_fashion_mnist_is_unpacked_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there packed is unpacked if its MD5 is right, and fetched anew if not."""
    asked: list[str] = []
    write_fashion(tmp_path / "data", 30, 20)
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    for path in list(raw.iterdir()):
        with gzip.open(raw / f"{path.name}.gz", "wb") as packed:
            packed.write(path.read_bytes())
        path.unlink()
    monkeypatch.setenv("HARNESS_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))

    def no_network(request: Request, *args: object, **kwargs: object) -> None:
        asked.append(request.full_url)
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(
        UsageError,
        match=r"neither in .*FashionMNIST/raw nor downloadable .*no network.*; point --data-dir",
    ):
        load_split(FASHION)
    assert "train-images" in asked[0]
    assert not list(raw.glob("*ubyte"))  # what has another MD5 is not used
    packed = sorted(raw.glob("*.gz"))
    right = [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in packed]
    monkeypatch.setattr(FashionMNIST, "resources", right)
    asked.clear()
    assert len(load_split(FASHION).train) == 30
    assert not asked


def test_broken_data_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion(tmp_path / "data", 30, 20)
    path = tmp_path / "data" / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])  # an unpacking that was cut off
    monkeypatch.setenv("HARNESS_DATA", str(tmp_path / "data"))
    with pytest.raises(
        UsageError, match=r"invalid for input of size.*or delete that folder if it is broken"
    ):
        load_split(FASHION)


def test_images_without_labels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion(tmp_path / "data", 30, 20)
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    (raw / "train-labels-idx1-ubyte").write_bytes((raw / "t10k-labels-idx1-ubyte").read_bytes())
    monkeypatch.setenv("HARNESS_DATA", str(tmp_path / "data"))
    with pytest.raises(UsageError, match="30 images have 20 labels"):
        load_split(FASHION)


def test_a_folder_of_data_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a relative one, for the command and for the workers that it starts."""
    monkeypatch.setenv("HARNESS_DATA", "elsewhere")
    monkeypatch.chdir(tmp_path)
    words = ["env", "--device", "cpu", "--data-dir", "data"]
    refused = CliRunner().invoke(main, words)
    assert (refused.exit_code, "there is no such folder" in refused.output) == (2, True)
    (tmp_path / "data").mkdir()
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert data_folder() == tmp_path / "data"
