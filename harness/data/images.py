"""Image sets: real images in [-1, 1] with labels, split into a training and a held-out part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from filelock import FileLock
from torch import Tensor

from harness.diffusion.conditions import Condition, Conditions
from harness.errors import UsageError, unknown
from harness.files import data_folder

UNREADABLE = (OSError, RuntimeError, ValueError, TypeError, KeyError, AssertionError, EOFError)
"""What torchvision raises for files that are missing, broken or not downloadable."""


@dataclass(frozen=True)
class ImageSet:
    """Real images.

    Attributes:
        images: [n, C, H, W], float32 in [-1, 1].
        labels: [n], int64, class labels or numbers of `conditions`.
        conditions: the prompts that the labels count; None means classes.
    """

    images: Tensor
    labels: Tensor
    conditions: Conditions | None = None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, items: Tensor) -> tuple[Tensor, Condition]:
        """Images [B, C, H, W] and conditions of items [B]."""
        return self.images[items], self.of(items)

    def of(self, items: Tensor) -> Condition:
        """Conditions of items [B]."""
        return (
            self.conditions.of(self.labels[items])
            if self.conditions
            else Condition(self.labels[items])
        )


@dataclass(frozen=True)
class Split:
    """The training part, which is also the reference of FID, and the held-out part."""

    train: ImageSet
    held_out: ImageSet


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

    It has its own split of 60,000 and 10,000 images, so `seed` is ignored. torchvision downloads
    missing files into `data_folder()` and checks their MD5.

    Raises:
        UsageError: if the files are missing and the download fails, or if they are broken.
    """
    from torchvision.datasets import FashionMNIST

    folder = data_folder()

    def part(train: bool) -> ImageSet:
        try:
            found = FashionMNIST(str(folder), train)
        except (RuntimeError, ValueError):  # missing, packed or incomplete
            (folder / "FashionMNIST").mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "FashionMNIST" / "lock"):
                found = FashionMNIST(str(folder), train, download=True)
        if len(found.data) != len(found.targets):
            raise ValueError(f"{len(found.data)} images have {len(found.targets)} labels")
        return ImageSet(found.data.unsqueeze(1).float() / 127.5 - 1, found.targets.long())

    try:
        return Split(part(True), part(False))
    except UNREADABLE as error:
        where = folder / "FashionMNIST" / "raw"
        why = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"Fashion-MNIST is neither in {where} nor downloadable ({why}); "
            "point --data-dir (or HARNESS_DATA) at the folder that holds FashionMNIST/raw, "
            "or delete that folder if it is broken"
        ) from error


IMAGE_SETS: dict[str, Callable[[int], Split]] = {"digits": digits, "fashion-mnist": fashion_mnist}


def load_split(name: str, seed: int) -> Split:
    """The image set of a name. Raises UsageError for an unknown one."""
    if name not in IMAGE_SETS:
        raise unknown("image set", name, IMAGE_SETS)
    return IMAGE_SETS[name](seed)
