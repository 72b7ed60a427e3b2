"""Rows of tensors in memory-mapped files, by item number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from harness.files import map_tensors


class Shards:
    """Named tensors of many items, cut into files of `size` items.

    Args:
        checked: whether the digest of each file is computed and compared.

    Raises UsageError for a file that is missing or was changed.
    """

    def __init__(self, paths: Sequence[Path], size: int, checked: bool = True):
        self.size, self._files = size, [map_tensors(path, checked) for path in paths]

    def rows(self, name: str, items: Tensor) -> Tensor:
        """One tensor's rows of items [B], as float32 where they are fp16: [B, ...]."""
        place = [divmod(item, self.size) for item in items.tolist()]
        found = torch.stack([self._files[file][name][row] for file, row in place])
        return found.float() if found.dtype == torch.float16 else found

    def whole(self, name: str) -> Tensor:
        """One tensor of all items, in memory."""
        return torch.cat([file[name] for file in self._files])
