"""Layers of the diffusion transformer (Peebles & Xie 2023, arXiv 2212.09748).

Every layer works on tokens [N, T, d] under a conditioning vector [N, d], which is computed once for
all tokens. N is the number of samples B, or B S where a pass takes S states of each sample.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.diffusion.conditions import Condition


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, d] -> [N, T, d]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(-3, 0).transpose(2, 3)
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of queries on keys, [N, heads, T, head width] each."""
        return F.scaled_dot_product_attention(q, k, v)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`x (1 + scale) + shift`; x [N, T, d], shift and scale [N, 1, d]."""
    return torch.addcmul(shift, x, 1 + scale)


class CrossAttention(nn.Module):
    """Attention of image tokens on text tokens; its output starts at zero."""

    def __init__(self, width: int, text_width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(text_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cond: Condition) -> Tensor:
        """x [B S, T, d] under the text of B samples to the shape of x.

        The text's keys and values are computed once for all states of a sample, and once for all
        steps where the conditions keep them (`Condition.once`).

        Raises ValueError if the conditions have no text.
        """
        if cond.text is None:
            raise ValueError("the network attends to text, but the conditions have none")
        states = self.q(x).unflatten(0, (len(cond.text), -1)).flatten(1, 2)
        q = states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = cond.once(self, partial(self.keys_values, cond.text))
        mask = None if cond.text_mask is None else cond.text_mask[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return self.proj(out).view_as(x)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, length, head width] of a text [B, length, text width]."""
        k, v = self.kv(text).unflatten(-1, (2, self.num_heads, -1)).movedim(2, 0).transpose(2, 3)
        return k, v


class Offset(nn.Module):
    """A vector that a block adds to the modulation that all share: PixArt's adaLN-single.

    Chen et al. 2023, arXiv 2310.00426, sec. 2.3.
    """

    def __init__(self, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(width))

    def forward(self, shared: Tensor) -> Tensor:
        """[N, width] -> [N, width]."""
        return shared + self.table


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning (fig. 3 of the paper).

    Args:
        single: whether all blocks share a modulation, to which each adds its own vector.
    """

    def __init__(self, width: int, num_heads: int, text_width: int = 0, single: bool = False):
        # Imported here because timm takes longer to import than torch.
        from timm.layers import GELUTanh, Mlp

        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, act_layer=GELUTanh)
        self.adaLN_modulation = (
            Offset(6 * width) if single else nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        )
        self.cross = CrossAttention(width, text_width, num_heads) if text_width else None

    def forward(self, x: Tensor, c: Tensor, cond: Condition) -> Tensor:
        """x [N, T, d] under c and the text of the conditions, to [N, T, d].

        c is the conditioning vector [N, d]; with `single` it is the shared modulation [N, 6 d].
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.adaLN_modulation(c).unsqueeze(-2).chunk(6, -1)
        )
        x = torch.addcmul(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1)))
        if self.cross is not None:
            x = x + self.cross(x, cond)
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """adaLN, then a linear map from a token to the pixels of its patch."""

    def __init__(self, width: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x [N, T, d] under c [N, d], to [N, T, patch^2 channels]."""
        shift, scale = self.adaLN_modulation(c).unsqueeze(-2).chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class TimestepEmbedder(nn.Module):
    """Sines and cosines of a scalar at 128 frequencies, through a two-layer network."""

    def __init__(self, width: int, num_features: int = 256, starts_at_zero: bool = False):
        super().__init__()
        self.num_features = num_features
        last = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(num_features, width), nn.SiLU(), last)
        # An added input changes nothing at first, so the student starts as its teacher.
        if starts_at_zero:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, t: Tensor) -> Tensor:
        """[...] -> [..., d], in the type of the weights.

        bf16 rounds 999 to 1000 and 749 to 748, so only the sines and cosines are cast to it.
        """
        weights = next(self.mlp.parameters()).dtype
        precise = torch.promote_types(torch.promote_types(t.dtype, weights), torch.float32)
        return self.mlp(sinusoids(t.to(precise), self.num_features).to(weights))


def sinusoids(t: Tensor, num_features: int = 256) -> Tensor:
    """Cosines, then sines, of t [...] at frequencies `10000^(-i / half)`: [..., num_features].

    Args:
        t: float32 or float64, which is also the type of the result.
        num_features: twice the number of frequencies, `half`.
    """
    half = num_features // 2
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=t.dtype, device=t.device) / half
    )
    angles = t.unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class LabelEmbedder(nn.Module):
    """A table of class vectors; its last row is the null class of guidance."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """[B] -> [B, d]."""
        return self.embedding_table(labels)


def sincos_position_embedding(width: int, grid: tuple[int, int]) -> Tensor:
    """The fixed 2-D sine-cosine embedding of a grid of tokens: [1, rows * columns, width]."""
    omega = 1 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    rows, columns = np.mgrid[: grid[0], : grid[1]].reshape(2, -1)
    parts = [
        wave(np.outer(position, omega)) for position in (columns, rows) for wave in (np.sin, np.cos)
    ]
    return torch.tensor(np.concatenate(parts, 1), dtype=torch.float32).unsqueeze(0)
