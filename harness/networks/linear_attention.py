"""Linear self-attention with ReLU, as Sana has it (Xie et al. 2024, arXiv 2410.10629, sec. 2.2).

`out_i = sum_j v_j (k_j . q_i) / sum_j (k_j . q_i)` with q and k above 0. So one matrix a head holds
all that a query needs of the keys and values, and the matrices of several states add up.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-15
"""What the denominator has in addition, as in diffusers."""


class LinearAttention(nn.Module):
    """Linear self-attention with the layers of an attention of diffusers, under the same names."""

    def __init__(self, attention: Any):
        super().__init__()
        self.heads = attention.heads
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.norm_q, self.norm_k = attention.norm_q, attention.norm_k
        self.to_out = attention.to_out

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, d] -> [N, T, d]. Sums are at least float32."""
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        q, k = self.norm_q(q) if self.norm_q else q, self.norm_k(k) if self.norm_k else k
        q, k, v = (
            part.transpose(1, 2)
            .unflatten(1, (self.heads, -1))
            .to(torch.promote_types(part.dtype, torch.float32))
            for part in (q.relu(), k.relu(), v)
        )
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            out = self.attend(q, summed(k, v))
        out = out.flatten(1, 2).transpose(1, 2).to(x.dtype)
        for layer in self.to_out:
            out = layer(out)
        return out

    def attend(self, q: Tensor, sums: Tensor) -> Tensor:
        """Values [N, heads, d, T] for queries [N, heads, d, T]; sums are those of `summed`."""
        return read(q, sums)


def summed(k: Tensor, v: Tensor) -> Tensor:
    """`sum_j (v_j, 1) k_j`, [N, heads, d + 1, d], of keys and values [N, heads, d, T]."""
    return F.pad(v, (0, 0, 0, 1), value=1.0) @ k.transpose(2, 3)


def read(q: Tensor, sums: Tensor) -> Tensor:
    """The attended values of queries [..., d, T] under sums [..., d + 1, d], [..., d, T]."""
    out = sums @ q
    return out[..., :-1, :] / (out[..., -1:, :] + EPS)
