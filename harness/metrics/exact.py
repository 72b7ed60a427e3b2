"""Metrics against a distribution whose density is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


@torch.enable_grad()
def kl_of_map(
    sample: Callable[[Tensor], Tensor], x_T: Tensor, log_density: Callable[[Tensor], Tensor]
) -> float:
    """KL divergence of a map's output distribution from a known density, by change of variables.

    `KL = E[log N(x_T) - log |det dG/dx_T| - log p(G(x_T))]` for standard normal noise x_T. The
    expectation is the mean over the given noise; an invertible map has no other error. Where G maps
    several x_T to one point, the density there is underestimated: the value is then a lower bound.

    Args:
        sample: the map G, differentiable; each sample depends on its own noise alone.
        x_T: the noise, [n, C, H, W].
        log_density: log p, from points [n, D] to [n].
    """
    x = x_T.detach().clone().requires_grad_(True)
    out = sample(x).flatten(1)
    rows = [
        torch.autograd.grad(out[:, i].sum(), x, retain_graph=True)[0].flatten(1)
        for i in range(out.shape[1])
    ]
    log_volume = torch.linalg.slogdet(torch.stack(rows, 1).double()).logabsdet
    flat = x.detach().flatten(1).double()
    log_noise = -flat.square().sum(1) / 2 - flat.shape[1] / 2 * math.log(2 * math.pi)
    return float((log_noise - log_volume - log_density(out.detach())).mean())
