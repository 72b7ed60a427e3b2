"""A small text encoder: words to a sequence of embeddings, padded and masked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LONGEST = 77
"""Tokens that a prompt may have, its end included, as in CLIP."""
PADDING, END = 0, 1
"""Tokens that are no words; words are numbered from 2."""


class TextEncoder(nn.Module):
    """A transformer over the words of a prompt.

    Args:
        words: the number of words that are known.
        width, depth, num_heads: width of the outputs, number of layers, attention heads.
    """

    def __init__(self, words: int, width: int, depth: int, num_heads: int):
        super().__init__()
        self.width = width
        self.token = nn.Embedding(words + 2, width)
        self.position = nn.Parameter(torch.zeros(LONGEST, width))
        self.layers = nn.ModuleList([TextLayer(width, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        # Of one size: a table of norm one, torch's default, would drown the order of the words.
        for embedding in (self.token.weight, self.position):
            nn.init.normal_(embedding, std=0.02)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens [B, length] with the mask of those that count, to outputs [B, length, width]."""
        x = self.token(tokens) + self.position[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, mask[:, None, None])
        return self.norm(x)


class TextLayer(nn.Module):
    """Attention on the words that count, then a network for each."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, length, width] under a mask [B, 1, 1, length] to the same shape."""
        whole = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = whole.movedim(2, 0).transpose(2, 3)
        seen = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = x + self.proj(seen)
        return x + self.mlp(self.norm2(x))


def padded(sentences: Sequence[Sequence[int]], least: int = 0) -> tuple[Tensor, Tensor]:
    """Words of sentences, each followed by its end, as tokens and mask, [n, length] each.

    Args:
        sentences: the numbers of the words, from 0.
        least: words that there is room for, so that several tables have one length.

    Raises ValueError for a sentence of more than 76 words.
    """
    if (most := max([least, *map(len, sentences)])) >= LONGEST:
        raise ValueError(f"a prompt has {most} words, but at most {LONGEST - 1} are read")
    tokens = torch.full((len(sentences), most + 1), PADDING)
    for row, words in enumerate(sentences):
        tokens[row, : len(words) + 1] = torch.tensor([*(word + 2 for word in words), END])
    return tokens, tokens != PADDING
