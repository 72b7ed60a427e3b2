"""Image sets: real images in [-1, 1] with labels, split into a training and a held-out part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from harness.data.arrays import Arrays
from harness.data.readers import Images, Reader, mirror
from harness.diffusion.conditions import Condition, Conditions
from harness.diffusion.randomness import Keyed
from harness.errors import UsageError
from harness.files import data_folder, digest, tensors_digest

UNREADABLE = (OSError, RuntimeError, ValueError, TypeError, KeyError, AssertionError, EOFError)
"""What torchvision raises for files that are missing, broken or not downloadable."""
ENOUGH = 10_000
"""Images of a large set on which its standard deviation is measured."""


@dataclass(frozen=True)
class ImageSet:
    """Real images.

    Attributes:
        images: [n, C, H, W], float32 in [-1, 1]: a tensor, or a reader of files.
        labels: [n], int64, class labels or numbers of `conditions`.
        conditions: the prompts that the labels count; None means classes.
        flip: whether training mirrors half of the images.
    """

    images: Images
    labels: Tensor
    conditions: Conditions | None = None
    flip: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, items: Tensor, mirrored: Tensor | None = None) -> tuple[Tensor, Condition]:
        """Images [B, C, H, W] and conditions of items [B].

        Args:
            mirrored: which of them are mirrored, [B]; None means none.
        """
        if mirrored is None:
            return self.images[items], self.of(items)
        if isinstance(self.images, Reader):
            return self.images.views(items, mirrored), self.of(items)
        return mirror(self.images[items], mirrored), self.of(items)

    def of(self, items: Tensor) -> Condition:
        """Conditions of items [B]."""
        return (
            self.conditions.of(self.labels[items])
            if self.conditions
            else Condition(self.labels[items])
        )

    @property
    def std(self) -> float:
        """Standard deviation of all numbers in the images, or of 10,000 of them in a large set."""
        if isinstance(self.images, Tensor):
            return float(self.images.double().std())
        order = Keyed("std", 0).permutation("images", len(self))[:ENOUGH]
        count, total, squares = 0, 0.0, 0.0
        for items in order.split(256):
            part = self.images[items].double()
            count, total = count + part.numel(), total + float(part.sum())
            squares += float(part.square().sum())
        return float(((squares - total**2 / count) / (count - 1)) ** 0.5)

    def content(self, rounded: bool = True) -> str:
        """SHA-256 of the images and labels. Of files, their names and bytes count.

        Args:
            rounded: whether a tensor is rounded to 8 bits first.
        """
        if isinstance(self.images, Tensor):
            images = to_uint8(self.images) if rounded else self.images
            return tensors_digest({"images": images, "labels": self.labels})
        assert isinstance(self.images, Reader)
        return digest([self.images.content(), tensors_digest({"labels": self.labels})])


@dataclass(frozen=True)
class Split:
    """The parts of an image set.

    Attributes:
        train: what training sees.
        held_out: real images that it does not see.
        apart: the reference of FID, where that is not the training part.
    """

    train: ImageSet
    held_out: ImageSet
    apart: ImageSet | None = None

    @property
    def reference(self) -> ImageSet:
        """The reference of FID."""
        return self.train if self.apart is None else self.apart


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] rounded to uint8, `round(127.5 (x + 1))`; same shape."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def digits(seed: int) -> Split:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 with 17 grey levels.

    The split is 80/20 and stratified by class: 1,437 and 360 images.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    images = torch.from_numpy(source.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(source.target).long()
    train, held_out = train_test_split(
        torch.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed
    )
    return Split(
        ImageSet(images[train], labels[train]), ImageSet(images[held_out], labels[held_out])
    )


def fashion_mnist(seed: int) -> Split:
    """Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): 28 x 28 with 256 grey levels.

    It has its own split of 60,000 and 10,000 images, so `seed` is ignored.
    """

    def images(found: Any) -> ImageSet:
        return ImageSet(found.data.unsqueeze(1).float() / 127.5 - 1, found.targets.long())

    return from_torchvision("FashionMNIST", "FashionMNIST/raw", images)


def cifar10(seed: int) -> Split:
    """CIFAR-10 (Krizhevsky 2009, "Learning multiple layers of features"): 32 x 32 in colour.

    It has its own split of 50,000 and 10,000 images, so `seed` is ignored.
    """

    def images(found: Any) -> ImageSet:
        labels = torch.tensor(found.targets)
        return ImageSet(Arrays(found.data, labels, (3, 32, 32)), labels)

    return from_torchvision("CIFAR10", "cifar-10-batches-py", images)


def from_torchvision(name: str, inside: str, images: Callable[[Any], ImageSet]) -> Split:
    """The two parts of a set of torchvision.

    torchvision downloads missing files into `data_folder()` and checks their MD5.

    Args:
        name: its class in `torchvision.datasets`.
        inside: the folder of its files in the data folder.
        images: makes an image set of torchvision's object.

    Raises:
        UsageError: if the files are missing and the download fails, or if they are broken.
    """
    from torchvision import datasets

    folder, cls = data_folder(), getattr(datasets, name)

    def part(train: bool) -> ImageSet:
        try:
            found = cls(str(folder), train)
        except (RuntimeError, ValueError):  # missing, packed or incomplete
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f"{name}.lock"):
                found = cls(str(folder), train, download=True)
        if len(found.data) != len(found.targets):
            raise ValueError(f"{len(found.data)} images have {len(found.targets)} labels")
        return images(found)

    try:
        return Split(part(True), part(False))
    except UNREADABLE as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"{name} is neither in {folder / inside} nor downloadable ({why}); "
            f"point --data-dir (or HARNESS_DATA) at the folder that holds {inside}, "
            "or delete that folder if it is broken"
        ) from error


IMAGE_SETS: dict[str, Callable[[int], Split]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
}
"""Sets that need no path. A plug-in adds its own."""
