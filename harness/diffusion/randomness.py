"""Keyed randomness: numbers that depend on (purpose, seed, step, name, sample index) alone.

So a batch, its micro-batches and several processes draw the same numbers. A resumed run needs no
generator state, and torch's global generator never moves.

The generator is Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
The key is a hash of (purpose, seed, step, name). The counter holds the sample index and the
position inside the sample. The Box-Muller transform makes normal numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(counter: Sequence[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Ten rounds of Philox-4x32 on arrays of counters.

    Args:
        counter: four arrays of one shape, uint64 holding 32-bit words.
        key: two 32-bit words.

    Returns:
        Four arrays of that shape, uint64 holding 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (product1 >> _HALF) ^ c1 ^ np.uint64(k0)
        c1 = product1 & _LOW
        c2 = (product0 >> _HALF) ^ c3 ^ np.uint64(k1)
        c3 = product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


class Keyed:
    """Random numbers for one purpose, seed and step.

    Args:
        purpose: separates families of numbers: "train", "evaluate", "trajectory", ...
        seed, step: any integers.
    """

    def __init__(self, purpose: str, seed: int, step: int = 0):
        self._prefix = f"{purpose}\0{seed}\0{step}\0"

    def _words(self, name: str, index: Tensor, count: int) -> np.ndarray:
        """`count` 32-bit words for each sample: uint64 [B, count]."""
        digest = hashlib.sha256((self._prefix + name).encode()).digest()
        key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
        blocks = -(-count // 4)
        sample = index.cpu().numpy().astype(np.uint64)[:, None]
        block = np.arange(blocks, dtype=np.uint64)[None, :]
        shape = (sample.shape[0], blocks)
        counter = [block & _LOW, block >> _HALF, sample & _LOW, sample >> _HALF]
        words = philox([np.broadcast_to(word, shape) for word in counter], key)
        return np.stack(words, -1).reshape(shape[0], 4 * blocks)[:, :count]

    def uniform(self, name: str, index: Tensor, shape: Sequence[int] = ()) -> Tensor:
        """Uniform numbers in (0, 1), float64 [B, *shape], for samples `index` [B]."""
        count = math.prod(shape)
        numbers = (self._words(name, index, count) + 0.5) / 2.0**32
        return torch.from_numpy(numbers.reshape(len(index), *shape))

    def normal(self, name: str, index: Tensor, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, float32 [B, *shape], for samples `index` [B]."""
        count = math.prod(shape)
        half = -(-count // 2)
        words = (self._words(name, index, 2 * half) + 0.5) / 2.0**32
        radius, angle = np.sqrt(-2 * np.log(words[:, :half])), 2 * np.pi * words[:, half:]
        numbers = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], 1)[:, :count]
        return torch.from_numpy(numbers.reshape(len(index), *shape).astype(np.float32))

    def permutation(self, name: str, size: int) -> Tensor:
        """A random order of `size` items, int64 [size]."""
        return self.uniform(name, torch.arange(size)).argsort(stable=True)


@contextmanager
def keyed_initialisation(seed: int, name: str) -> Iterator[None]:
    """Inside, torch's generator is seeded by (seed, name); its state is restored afterwards."""
    state = int.from_bytes(hashlib.sha256(f"init\0{seed}\0{name}".encode()).digest()[:7], "little")
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(state)
        yield
