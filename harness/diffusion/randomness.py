"""Keyed randomness: numbers that depend on (purpose, seed, step, name, sample index) alone.

So a batch, its micro-batches and several processes draw the same numbers. A resumed run needs no
generator state, and torch's global generator never moves.

The generator is Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
The key is a hash of (purpose, seed, step, name). The counter holds the sample index and the
position inside the sample. The Box-Muller transform makes normal numbers.

Numbers are drawn on the device of the sample indices. Words and uniform numbers are equal bit for
bit on every device, because integer arithmetic and the scaling by 2^-32 are exact. Normal numbers
are computed in float64 and rounded to float32, so they differ only where two logarithms or cosines
that differ in their last float64 bit round apart: about one number in 10^8, by one float32 bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Ten rounds of Philox-4x32.

    Args:
        counter: four tensors of one shape, int64 holding 32-bit words.
        key: two 32-bit words.

    Returns:
        Four tensors of that shape, int64 holding 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # all 64 bits, sign or not
        c0, c1 = ((product1 >> 32) & _LOW) ^ c1 ^ k0, product1 & _LOW
        c2, c3 = ((product0 >> 32) & _LOW) ^ c3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return [c0, c1, c2, c3]


class Keyed:
    """Random numbers for one purpose, seed and step.

    Args:
        purpose: separates families of numbers: "train", "evaluate", "trajectory", ...
        seed, step: any integers.
    """

    def __init__(self, purpose: str, seed: int, step: int = 0):
        self._prefix = f"{purpose}\0{seed}\0{step}\0"

    def _uniform(self, name: str, index: Tensor, count: int) -> Tensor:
        """`count` numbers in (0, 1) a sample, float64 [B, count], each from a 32-bit word."""
        digest = hashlib.sha256((self._prefix + name).encode()).digest()
        key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
        sample, block = index[:, None], torch.arange(-(-count // 4), device=index.device)
        counter = torch.broadcast_tensors(block & _LOW, block >> 32, sample & _LOW, sample >> 32)
        words = torch.stack(philox(counter, key), -1).flatten(1)[:, :count]
        return (words.double() + 0.5) / 2.0**32

    def uniform(self, name: str, index: Tensor, shape: Sequence[int] = ()) -> Tensor:
        """Uniform numbers in (0, 1) for samples `index` [B]: float64 [B, *shape], on its device."""
        return self._uniform(name, index, math.prod(shape)).reshape(len(index), *shape)

    def normal(self, name: str, index: Tensor, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers for samples `index` [B]: float32 [B, *shape], on its device."""
        count = math.prod(shape)
        half = -(-count // 2)
        first, second = self._uniform(name, index, 2 * half).split(half, 1)
        radius, angle = (-2 * first.log()).sqrt(), 2 * math.pi * second
        numbers = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count]
        return numbers.float().reshape(len(index), *shape)

    def permutation(self, name: str, size: int) -> Tensor:
        """A random order of `size` items, int64 [size]."""
        return self.uniform(name, torch.arange(size)).argsort(stable=True)


@contextmanager
def keyed_initialisation(seed: int, name: str) -> Iterator[None]:
    """Inside, modules draw initial weights from a generator seeded by (seed, name).

    Torch's own CPU generator is restored afterwards.
    """
    state = int.from_bytes(hashlib.sha256(f"init\0{seed}\0{name}".encode()).digest()[:7], "little")
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(state)
        yield
