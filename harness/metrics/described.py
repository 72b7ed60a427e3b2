"""What a published network says of a set of pictures: moments, scores and features.

Pictures come in batches and are dropped at once. So memory holds features at most, and moments
alone where nothing needs more.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness import ranks
from harness.data.arrays import BROKEN, read_array
from harness.data.cache import cached_tensors
from harness.data.pictures import NpzPictures, Pictures
from harness.errors import UsageError
from harness.files import check_hash
from harness.metrics.extractors import Extractor
from harness.metrics.moments import Moments, Pair, SplitScores
from harness.progress import Progress

Drawn = Callable[[Tensor], Tensor]
"""From a batch of samples to pictures, uint8 [B, 1 or 3, H, W]."""
MANY = 16
"""Batches of a network that are read at once; whole ones, so that each picture has its place."""


def as_they_are(pictures: Tensor) -> Tensor:
    """Pictures that need no decoding."""
    return pictures


@dataclass(frozen=True)
class Description:
    """A set of pictures as a published network sees it.

    Attributes:
        moments: of the features.
        spatial: of Inception's spatial features, or None.
        score: the Inception score over contiguous parts, or None.
        features: float32 [n, d], or None where only moments are known.
    """

    moments: Pair
    spatial: Pair | None = None
    score: float | None = None
    features: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The same as named tensors."""
        found = {"mean": self.moments[0], "covariance": self.moments[1]}
        if self.spatial:
            found |= {"spatial mean": self.spatial[0], "spatial covariance": self.spatial[1]}
        if self.score is not None:
            found["score"] = torch.tensor(self.score, dtype=torch.float64)
        if self.features is not None:
            found["features"] = self.features
        return found

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Description:
        """The inverse of `tensors`."""
        spatial, score = tensors.get("spatial mean"), tensors.get("score")
        return cls(
            (tensors["mean"], tensors["covariance"]),
            None if spatial is None else (spatial, tensors["spatial covariance"]),
            None if score is None else float(score),
            tensors.get("features"),
        )


@torch.no_grad()
def describe(
    extractor: Extractor,
    batches: Iterable[Tensor],
    n: int,
    keep: bool = True,
    progress: Progress | None = None,
    drawn: Drawn = as_they_are,
) -> Description:
    """What a network says of n pictures.

    Args:
        batches: pictures, or samples of which `drawn` makes pictures.
        keep: whether the features themselves are kept, besides their moments.
        drawn: makes pictures of a batch, uint8 [B, 1 or 3, H, W].
    """
    moments, spatial, scores = Moments(), Moments(), SplitScores(n)
    features: list[Tensor] = []

    def seen(batch: Tensor) -> list[dict[str, Tensor]]:
        parts = drawn(batch).split(extractor.at_once)
        ready = (part.expand(-1, 3, -1, -1).to(extractor.device) for part in parts)
        return [{name: x.cpu() for name, x in extractor.parts(images).items()} for images in ready]

    for batch in ranks.each(seen, batches):
        for found in batch:
            moments.add(found["features"])
            if "spatial" in found:
                spatial.add(found["spatial"])
                scores.add(found["logits"])
            if keep:
                features.append(found["features"].float().cpu())
            if progress:
                progress(moments.count, n)
    return Description(
        moments.pair,
        spatial.pair if spatial.count else None,
        scores.mean if spatial.count else None,
        torch.cat(features) if keep else None,
    )


def cached_description(
    key: dict[str, Any],
    extractor: Extractor,
    batches: Iterable[Tensor],
    n: int,
    keep: bool = True,
    progress: Progress | None = None,
    drawn: Drawn = as_they_are,
) -> Description:
    """`describe`, kept in the cache under the key and the network's SHA-256."""
    whole = {
        **key,
        "extractor": [type(extractor).__name__, extractor.sha256],
        "features kept": keep,
    }
    return Description.of(
        cached_tensors(
            whole, lambda: describe(extractor, batches, n, keep, progress, drawn).tensors()
        )
    )


class ReferenceFile:
    """ADM's `.npz` of a reference: pictures (`arr_0`), moments of features, or both.

    Args:
        sha256: the SHA-256 that the file must have; None takes any.

    Attributes:
        pictures: the pictures, or None.
        moments: `mu` and `sigma`, or None.
        spatial: `mu_s` and `sigma_s`, or None.

    Raises UsageError if the file is missing, changed, or holds neither.
    """

    def __init__(self, path: Path, sha256: str | None):
        self.path = path
        check_hash(path, sha256)
        try:
            with zipfile.ZipFile(path) as archive:
                names = {name.removesuffix(".npy") for name in archive.namelist()}
            self.moments = self._pair("mu", "sigma")
            self.spatial = self._pair("mu_s", "sigma_s")
        except BROKEN as error:
            raise UsageError(f"{path} is no .npz file of a reference ({error})") from error
        self.pictures: Pictures | None = NpzPictures(path) if "arr_0" in names else None
        if self.pictures is None and self.moments is None:
            raise UsageError(f"{path} holds {', '.join(sorted(names))}, but neither arr_0 nor mu")

    def _pair(self, mean: str, covariance: str) -> Pair | None:
        """Two arrays of the file as moments; None if it lacks one. Raises ValueError for others."""
        first, second = read_array(self.path, mean, 1), read_array(self.path, covariance, 2)
        if first is None or second is None:
            return None
        if second.shape != (len(first), len(first)):
            raise ValueError(f"{mean} has {len(first)} numbers, {covariance} {second.shape}")
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            raise ValueError(f"{mean} or {covariance} is not finite")
        return torch.from_numpy(first).double(), torch.from_numpy(second).double()

    def description(
        self, key: dict[str, Any], extractor: Extractor, progress: Progress | None = None
    ) -> Description:
        """The reference as a network sees it; stated moments go before those of its pictures."""
        if self.pictures is None:
            assert self.moments is not None
            return Description(self.moments, self.spatial)
        batches = self.pictures.batches(MANY * extractor.at_once)
        own = cached_description(key, extractor, batches, len(self.pictures), progress=progress)
        return Description(
            self.moments or own.moments, self.spatial or own.spatial, features=own.features
        )
