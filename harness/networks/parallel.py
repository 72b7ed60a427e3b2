"""Networks with a head for each of several solver intervals (PDD, arXiv 2607.26004).

The last linear layer has one copy for each interval. The mean of the heads' outputs over a block of
intervals is one linear layer with the mean of their weights, so a block costs as much as one head.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.networks.backbones import Backbone
from harness.networks.swapping import Swapped, swap


class ParallelHeads(Swapped, nn.Linear):
    """A linear layer whose weights are those of all heads, [heads * out, d].

    Attributes:
        lengths: the length of each head's interval, float32 [heads].
        blocks: the first head, and the one after the last, of each block of the pass, [M] each.
    """

    lengths: Tensor
    blocks: tuple[Tensor, Tensor] | None

    def forward(self, h: Tensor) -> Tensor:
        """h [B, T, d] to the mean output of each block, [M, T, out]; M is a multiple of B."""
        assert self.blocks is not None
        first, last = (edge.unsqueeze(1) for edge in self.blocks)
        count = len(self.lengths)
        heads = torch.arange(count, device=h.device)
        shares = torch.where((heads >= first) & (heads < last), self.lengths, 0.0)
        shares = (shares / shares.sum(1, keepdim=True)).to(self.weight.dtype)
        weight = (shares @ self.weight.unflatten(0, (count, -1)).flatten(1)).unflatten(
            1, (-1, self.in_features)
        )
        bias = shares @ self.bias.unflatten(0, (count, -1))
        tokens = h.repeat(len(shares) // len(h), 1, 1)
        return tokens @ weight.transpose(1, 2).to(h.dtype) + bias.unsqueeze(1).to(h.dtype)


class Parallel(Swapped, Backbone):
    """A backbone with parallel heads.

    The scalars `first` and `last` of the conditions name a block of intervals for each sample, and
    may name several blocks: R B numbers for B samples. The output is that of each block.
    """

    def forward(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        """[B, C, H, W] to [R B, C', H, W]: all samples under the first blocks, then the next."""
        heads = cast(ParallelHeads, self.last_layer(self.head))
        heads.blocks = cond.scalars["first"], cond.scalars["last"]
        try:
            return super().forward(x, time, cond)  # type: ignore[safe-super]
        finally:
            heads.blocks = None

    def load_teacher(self, state: dict[str, Tensor]) -> None:
        """Loads a plain network's weights; every head becomes a copy of its last layer."""
        last = cast(ParallelHeads, self.last_layer(self.head))
        (name,) = (name for name, module in self.named_modules() if module is last)
        copies = {
            key: state[key].repeat(len(last.lengths), *[1] * (state[key].dim() - 1))
            for key in (f"{name}.weight", f"{name}.bias")
        }
        super().load_teacher({**state, **copies})


def with_parallel_heads(network: Backbone, lengths: Tensor) -> Parallel:
    """A network with a head for each interval; its keys stay, and its last layer grows.

    Args:
        network: the network, which is changed in place.
        lengths: the length of each interval, [heads].
    """
    last = network.last_layer(network.head)
    for name, value in list(last.named_parameters()):
        copies = value.detach().repeat(len(lengths), *[1] * (value.dim() - 1))
        setattr(last, name, nn.Parameter(copies))
    last.register_buffer("lengths", lengths.float(), persistent=False)  # moves with the network
    swap(last, ParallelHeads, blocks=None)
    swap(network, Parallel)
    return cast(Parallel, network)
