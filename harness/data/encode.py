"""Latents of an image set, encoded once: by any number of processes, in shards, resumable.

A folder of latents has `plan.json`, which says what they are of and how they are made, the shards,
and `manifest.json` once all shards are there. `harness.data.latents` reads it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from harness.data.filling import fill
from harness.data.images import ImageSet
from harness.data.latents import MANIFEST
from harness.data.readers import read_ahead
from harness.data.shards import error_of, halved, remember
from harness.diffusion.randomness import Keyed
from harness.errors import UsageError
from harness.files import written_digest
from harness.progress import Progress
from harness.seals import write_sealed_json


class Encoder(Protocol):
    """What makes latents of images."""

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [B, c, h, w] of images [B, C, H, W] in [-1, 1].

        Args:
            noise: [B, c, h, w], draws from the posterior; None takes its mean.
        """


@dataclass(frozen=True)
class Encoding:
    """How latents are made.

    Attributes:
        shape: c, h and w of a latent.
        posterior: its mean, or one sample of it, which is drawn once and stored.
        mirrored: whether mirrored images are encoded too, as a second view.
        dtype: how numbers are stored; float16 states its error in the manifest.
        seed: draws the sample.
        shard_size, batch_size: images in a file, and in one call of the encoder.
    """

    shape: tuple[int, int, int]
    posterior: Literal["mean", "sample"] = "mean"
    mirrored: bool = False
    dtype: Literal["float32", "float16"] = "float32"
    seed: int = 0
    shard_size: int = 4096
    batch_size: int = 32

    @property
    def views(self) -> tuple[str, ...]:
        """The tensors of latents in a shard."""
        return ("latents", "mirrored") if self.mirrored else ("latents",)

    @property
    def size(self) -> int:
        """Bytes of one image's latents."""
        return len(self.views) * math.prod(self.shape) * (4 if self.dtype == "float32" else 2)


def encode(
    images: ImageSet,
    encoder: Encoder,
    folder: Path,
    how: Encoding,
    about: dict[str, Any],
    *,
    rank: int = 0,
    ranks: int = 1,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Encodes the shards of one rank that are missing; whoever sees all writes the manifest.

    Args:
        about: what the manifest says of the images and of the autoencoder, JSON-like. It decides,
            with `how` and the content of the images, whether a folder may be continued.

    Returns:
        The number of shards that are there, and of all.

    Raises:
        UsageError: if the folder holds other latents, if an image cannot be read, or if the disk
            is too small.
    """
    plan = {
        **about,
        "count": len(images),
        "images": images.content(),
        **{name: value for name, value in asdict(how).items() if name != "batch_size"},
    }
    paths = fill(
        folder,
        plan,
        len(images),
        how.shard_size,
        lambda shard: _encoded(images, encoder, how, shard),
        what="latents",
        size=how.size,
        rank=rank,
        ranks=ranks,
        progress=progress,
    )
    there = sum(path.exists() for path in paths)
    if there == len(paths):
        _finish(folder, plan, paths, how, images.labels)
    return there, len(paths)


def _encoded(
    images: ImageSet, encoder: Encoder, how: Encoding, shard: range
) -> Iterator[dict[str, Tensor]]:
    """Latents and labels of a shard's items, a batch at a time."""

    def read(items: Tensor) -> tuple[Tensor, list[Tensor]]:
        every = torch.ones(len(items), dtype=torch.bool)
        masks = (None, every) if how.mirrored else (None,)
        return items, [images.batch(items, mask)[0] for mask in masks]

    for items, views in read_ahead(
        read, torch.arange(shard.start, shard.stop).split(how.batch_size)
    ):
        found = {"labels": images.labels[items]}
        for name, view in zip(how.views, views, strict=True):
            noise = (
                Keyed("encode", how.seed).normal(name, items, how.shape)
                if how.posterior == "sample"
                else None
            )
            latents = encoder.encode(view, noise).float().cpu()
            if tuple(latents.shape[1:]) != tuple(how.shape):
                raise UsageError(
                    f"latents of images {list(view.shape[1:])} have the shape "
                    f"{list(latents.shape[1:])}, but {list(how.shape)} was expected"
                )
            found[name] = latents
        yield halved(found, how.views) if how.dtype == "float16" else found


def _finish(
    folder: Path, plan: dict[str, Any], paths: list[Path], how: Encoding, labels: Tensor
) -> None:
    """Writes the manifest: the plan, images by class, the error of rounding, and the shards."""
    classes, counts = labels.unique(return_counts=True)
    content = {
        **plan,
        "labels": dict(zip(map(str, classes.tolist()), counts.tolist(), strict=True)),
        **({"error": error_of(paths, how.views)} if how.dtype == "float16" else {}),
        "shards": [{"file": path.name, "digest": written_digest(path)} for path in paths],
    }
    write_sealed_json(folder / MANIFEST, content)
    remember(folder, [path.name for path in paths])
