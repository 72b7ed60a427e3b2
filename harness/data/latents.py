"""Latents that `harness data encode` wrote: shards of safetensors, mapped, with a manifest."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from harness.data.readers import Reader
from harness.data.shards import Shards
from harness.errors import UsageError
from harness.files import digest

MANIFEST = "manifest.json"


class Latents(Reader):
    """The latents of a folder.

    Args:
        shape: C, H and W of a latent.
        flip: whether mirrored images are asked for.

    Raises:
        UsageError: if the folder is unfinished, broken or of another shape, or if it has no
            mirrored view though one is asked for.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], flip: bool = False):
        try:
            self.manifest = json.loads((path / MANIFEST).read_text())
            names = [shard["file"] for shard in self.manifest["shards"]]
            size, found = self.manifest["shard_size"], self.manifest["shape"]
            self.mirrored = bool(self.manifest["mirrored"])
        except FileNotFoundError as error:
            raise UsageError(
                f"{path} has no {MANIFEST}: let `harness data encode` finish it"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path / MANIFEST} is broken; encode the images again") from error
        if tuple(found) != tuple(shape):
            raise UsageError(
                f"latents in {path} have the shape {found}, but data.shape is {list(shape)}"
            )
        if flip and not self.mirrored:
            raise UsageError(
                f"latents in {path} have no mirrored view: encode with --flips, "
                "or leave data.flip out"
            )
        self._shards = Shards([path / name for name in names], size, checked=False)
        self.labels = self._shards.whole("labels")
        self.shape = (len(self.labels), *shape)

    def views(self, items: Tensor, mirrored: Tensor | bool) -> Tensor:
        plain = self._shards.rows("latents", items)
        where = torch.as_tensor(mirrored).expand(len(items))
        if bool(where.any()):
            plain[where] = self._shards.rows("mirrored", items[where])
        return plain

    def content(self) -> str:
        """SHA-256 of the digests that the manifest gives for its shards."""
        return digest([self.manifest["shape"], self.manifest["shards"]])
