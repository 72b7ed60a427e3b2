"""Numbers of a set that comes in batches: its moments, and the Inception score of its parts."""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""A mean [d] and a covariance [d, d], float64."""
SPLITS = 10
"""Contiguous parts over which the Inception score is averaged: of 5,000 for 50,000 samples."""


class Moments:
    """Mean and covariance of vectors, merged batch by batch in float64.

    Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
    variances". The covariance divides by n - 1, as NumPy's does.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._scatter = torch.empty(0)

    def add(self, vectors: Tensor) -> None:
        """Adds vectors [B, d]."""
        vectors = vectors.detach().cpu().double()
        mean, size = vectors.mean(0), len(vectors)
        centred = vectors - mean
        scatter = centred.t() @ centred
        if self.count == 0:
            self._mean, self._scatter = mean, scatter
        else:
            apart, whole = mean - self._mean, self.count + size
            self._scatter += scatter + torch.outer(apart, apart) * (self.count * size / whole)
            self._mean = self._mean + apart * (size / whole)
        self.count += size

    @property
    def pair(self) -> Pair:
        """Mean [d] and covariance [d, d] of all vectors."""
        return self._mean, self._scatter / (self.count - 1)


class SplitScores:
    """The Inception score, averaged over contiguous parts of a set.

    Salimans et al. 2016, arXiv 1606.03498, sec. 4: exp(E KL(p(y|x) || p(y))). The order of the set
    counts: classes that lie one after the other lower it.

    Args:
        n: the number of all samples.
    """

    def __init__(self, n: int, splits: int = SPLITS):
        self._ends = [(k + 1) * n // splits for k in range(splits)]
        self._place = 0
        self._sums: list[Tensor] = []
        self._negentropy = [0.0] * splits

    def add(self, logits: Tensor) -> None:
        """Adds the logits [B, classes] of the next samples."""
        log_p = logits.detach().cpu().double().log_softmax(1)
        index = torch.arange(self._place, self._place + len(log_p))
        part = torch.searchsorted(torch.tensor(self._ends), index, right=True)
        if not self._sums:
            self._sums = [torch.zeros(log_p.shape[1], dtype=torch.float64) for _ in self._ends]
        for k in part.unique().tolist():
            mine = log_p[part == k]
            self._sums[k] += mine.exp().sum(0)
            self._negentropy[k] += float((mine.exp() * mine).sum())
        self._place += len(log_p)

    @property
    def mean(self) -> float:
        """The mean over all parts that hold samples."""
        sizes = [end - start for start, end in zip([0, *self._ends], self._ends, strict=False)]
        scores = [
            _score(total / size, negentropy / size)
            for total, negentropy, size in zip(self._sums, self._negentropy, sizes, strict=True)
            if size
        ]
        return sum(scores) / len(scores)


def _score(marginal: Tensor, negentropy: float) -> float:
    """exp(E sum p log p - sum q log q) for the marginal q [classes]."""
    return float((negentropy - torch.special.xlogy(marginal, marginal).sum()).exp())
