"""A sampler from elsewhere, judged on the noise and labels of a task.

harness evaluate --task digits --callable examples.own_sampler:sample --num-steps 1 --name mine
"""

from __future__ import annotations

from torch import Tensor


def sample(noise: Tensor, labels: Tensor) -> Tensor:
    """Pictures [B, C, H, W] in [-1, 1] from noise [B, C, H, W] and labels [B].

    This one only lights the row that the label names; yours would call your network.
    """
    pictures = noise.clamp(-1, 1) * 0.2 - 0.8
    rows = labels % noise.shape[2]
    pictures[range(len(labels)), :, rows] += 1.6
    return pictures
