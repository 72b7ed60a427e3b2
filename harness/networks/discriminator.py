"""Discriminator heads on the tokens of a frozen diffusion transformer (ARD, arXiv 2504.11295).

Each block of the teacher has one head. A head is a spectrally normalised convolution along the
tokens with kernel 1, then a residual one with kernel 9 and circular padding. Each is followed by
batch norm over virtual batches and a leaky ReLU. The logits are projected on an embedding of time
and class.

A forward pass changes no state: the spectral norm's power iteration is a call of its own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDING = 64
"""Width of the embedding on which logits are projected."""


class SpectralConv1d(nn.Module):
    """A 1-D convolution whose weight is divided by its largest singular value.

    Source: Miyato et al. 2018, arXiv 1802.05957, sec. 2.1.
    """

    def __init__(self, channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, channels, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.xavier_uniform_(self.weight)
        self.left: Tensor
        self.right: Tensor
        self.register_buffer("left", F.normalize(torch.randn(out_channels), dim=0))
        self.register_buffer("right", F.normalize(torch.randn(channels * kernel_size), dim=0))
        for _ in range(15):
            self.power_iteration()

    @torch.no_grad()
    def power_iteration(self) -> None:
        """One step of the power iteration towards the weight's largest singular value."""
        matrix = self.weight.flatten(1)
        self.right.copy_(F.normalize(matrix.t() @ self.left, dim=0))
        self.left.copy_(F.normalize(matrix @ self.right, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, T] -> [N, out_channels, T], with circular padding.

        `F.pad` goes around once at most, which few tokens do not allow.
        """
        norm = self.left @ self.weight.flatten(1) @ self.right
        half = self.weight.shape[2] // 2
        around = torch.arange(-half, x.shape[2] + half, device=x.device) % x.shape[2]
        return F.conv1d(x[:, :, around], self.weight / norm, self.bias)


class VirtualBatchNorm(nn.Module):
    """Batch norm within groups of `size` consecutive samples, without running statistics."""

    def __init__(self, channels: int, size: int, eps: float = 1e-5):
        super().__init__()
        self.size, self.eps = size, eps
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, T] to the same shape.

        Raises:
            ValueError: unless N is at most `size` or a multiple of it.
        """
        size = min(self.size, len(x))
        if len(x) % size:
            raise ValueError(
                f"{len(x)} samples are not a multiple of the virtual batch size {size}"
            )
        groups = x.float().unflatten(0, (-1, size))
        var, mean = torch.var_mean(groups, (1, 3), correction=0, keepdim=True)
        normed = ((groups - mean) * (var + self.eps).rsqrt()).flatten(0, 1)
        return normed * self.weight[:, None] + self.bias[:, None]


class Layer(nn.Sequential):
    """Convolution, norm and leaky ReLU: [N, width, T] to the same shape."""

    def __init__(self, width: int, kernel_size: int, virtual_batch: int):
        super().__init__(
            SpectralConv1d(width, width, kernel_size),
            VirtualBatchNorm(width, virtual_batch),
            nn.LeakyReLU(0.2),
        )


class Head(nn.Module):
    """The logits of one block's tokens."""

    def __init__(self, width: int, virtual_batch: int):
        super().__init__()
        self.pointwise, self.wide = Layer(width, 1, virtual_batch), Layer(width, 9, virtual_batch)
        self.logits, self.project = SpectralConv1d(width, EMBEDDING, 1), nn.Linear(width, EMBEDDING)

    def forward(self, tokens: Tensor, c: Tensor) -> Tensor:
        """Tokens [N, T, d] and the conditioning vector [N, d] to logits [N, T]."""
        h = self.pointwise(tokens.transpose(1, 2))
        h = (h + self.wide(h)) / math.sqrt(2)
        return (self.logits(h) * self.project(c).unsqueeze(-1)).float().sum(1) / math.sqrt(
            EMBEDDING
        )


class Heads(nn.ModuleList):
    """One head for each of `depth` blocks of a network of width `width`."""

    def __init__(self, depth: int, width: int, virtual_batch: int):
        super().__init__(Head(width, virtual_batch) for _ in range(depth))

    def power_iteration(self) -> None:
        """One step of the power iteration of every spectral norm."""
        for module in self.modules():
            if isinstance(module, SpectralConv1d):
                module.power_iteration()
