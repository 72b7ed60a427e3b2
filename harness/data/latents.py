"""Latents that `harness data encode` wrote: shards of safetensors, mapped, with a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.data.readers import Reader
from harness.data.shards import Shards, damaged
from harness.errors import UsageError
from harness.files import check_name, digest, map_tensors, written_digest
from harness.seals import read_sealed_json

MANIFEST = "manifest.json"


class Latents(Reader):
    """The latents of a folder.

    Args:
        shape: C, H and W of a latent.
        flip: whether mirrored images are asked for.
        autoencoder: what is known of the autoencoder that should have made them, among `sha256`,
            `scaling` and `shift`.

    Raises:
        UsageError: if the folder is unfinished, broken, of another shape or autoencoder, if a shard
            is not the manifest's, or if there is no mirrored view though one is asked for.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int],
        flip: bool = False,
        autoencoder: Mapping[str, Any] | None = None,
    ):
        try:
            self.manifest = read_sealed_json(path / MANIFEST)
            shards = self.manifest["shards"]
            digests = {check_name(shard["file"], "a shard"): shard["digest"] for shard in shards}
            size, found = int(self.manifest["shard_size"]), list(self.manifest["shape"])
            self.mirrored = bool(self.manifest["mirrored"])
        except FileNotFoundError as error:
            raise UsageError(
                f"{path} has no {MANIFEST}: let `harness data encode` finish it"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
            raise UsageError(
                f"{path / MANIFEST} is broken; let `harness data encode` write it again"
            ) from error
        if tuple(found) != tuple(shape):
            raise UsageError(
                f"latents in {path} have the shape {found}, but data.shape is {list(shape)}"
            )
        if flip and not self.mirrored:
            raise UsageError(
                f"latents in {path} have no mirrored view: encode with --flips, "
                "or leave data.flip out"
            )
        self._check_maker(path, autoencoder or {})

        def check(shard: Path) -> None:
            map_tensors(shard)
            if written_digest(shard) != digests[shard.name]:
                raise UsageError(f"{shard} is not what {MANIFEST} names: it must be made again")

        if bad := damaged(path, digests, check):
            first = next(iter(bad.values()))
            raise UsageError(f"{first}, by the same `harness data encode` as before")
        self._shards = Shards([path / name for name in digests], size, checked=False)
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

    def _check_maker(self, path: Path, own: Mapping[str, Any]) -> None:
        """Raises UsageError if the manifest names another autoencoder than the task's."""
        made_by = self.manifest.get("autoencoder")
        if not isinstance(made_by, dict):
            return
        other = [
            f"{name} {made_by.get(name)} in place of {value}"
            for name, value in own.items()
            if made_by.get(name) != value
        ]
        if other:
            raise UsageError(
                f"latents in {path} are of another autoencoder than the task's: "
                f"{', '.join(other)}; encode the images again, or name the right folders"
            )
