"""Networks whose last linear layer has several copies: heads, which one pass evaluates.

Parallel heads stand for the intervals of a solver (PDD, arXiv 2607.26004). The mean of their
outputs over a block of intervals is one linear layer with the mean of their weights, so a block
costs as much as one head. Other heads are all evaluated, and describe a policy (pi-Flow).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
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


class Headed(Swapped, Backbone):
    """A backbone with several heads.

    Attributes:
        copied: how many heads start as the teacher's last layer; those after them start at zero.
        spread: standard deviation of what is added to the biases of these copies.
    """

    copied: int
    spread: float

    def load_teacher(self, state: dict[str, Tensor]) -> None:
        """Loads a plain network's weights; the heads become copies of its last layer."""
        last = self.last_layer(self.head)
        (name,) = (name for name, module in self.named_modules() if module is last)
        heads = len(last.weight) // len(state[f"{name}.weight"])
        copies = {
            key: repeated(state[key], self.copied, heads)
            for key in (f"{name}.weight", f"{name}.bias")
        }
        copies[f"{name}.bias"] = self.spread_out(copies[f"{name}.bias"], heads)
        super().load_teacher({**state, **copies})

    def spread_out(self, bias: Tensor, heads: int) -> Tensor:
        """The bias of all heads, with noise on that of the copies."""
        size = len(bias) // heads * self.copied
        noise = self.spread * torch.randn(size, dtype=bias.dtype) if self.spread else None
        return bias if noise is None else torch.cat([bias[:size] + noise, bias[size:]])


class Parallel(Headed):
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


class AllHeads(Swapped, nn.Linear):
    """A linear layer whose weights are those of all heads, [heads * out, d].

    Attributes:
        heads: number of heads.
    """

    heads: int

    def forward(self, h: Tensor) -> Tensor:
        """h [B, T, d] to the output of each head, [heads B, T, out], the first head's first."""
        outputs = F.linear(h, self.weight, self.bias).unflatten(-1, (self.heads, -1))
        return outputs.movedim(2, 0).flatten(0, 1)


def repeated(value: Tensor, copied: int, heads: int) -> Tensor:
    """A weight or bias `copied` times, then zeros, so that there are `heads`."""
    ones = [1] * (value.dim() - 1)
    copies = value.detach().repeat(copied, *ones)
    return torch.cat([copies, torch.zeros_like(value).repeat(heads - copied, *ones)])


def widen(network: Backbone, copied: int, heads: int) -> nn.Linear:
    """Gives the last layer the weights of `heads` heads, in place."""
    last = network.last_layer(network.head)
    for name, value in list(last.named_parameters()):
        setattr(last, name, nn.Parameter(repeated(value, copied, heads)))
    return last


def with_parallel_heads(network: Backbone, lengths: Tensor) -> Parallel:
    """A network with a head for each interval; its keys stay, and its last layer grows.

    Args:
        network: the network, which is changed in place.
        lengths: the length of each interval, [heads].
    """
    last = widen(network, len(lengths), len(lengths))
    last.register_buffer("lengths", lengths.float(), persistent=False)  # moves with the network
    swap(last, ParallelHeads, blocks=None)
    swap(network, Parallel, copied=len(lengths), spread=0.0)
    return cast(Parallel, network)


def with_all_heads(network: Backbone, copied: int, more: int, spread: float) -> Headed:
    """A network whose pass gives the output of each head, [heads B, C', H, W], in this order.

    Args:
        network: the network, which is changed in place.
        copied: number of heads that start as copies of the last layer.
        more: number of heads after them, which start at zero.
        spread: standard deviation of noise on the copies' biases, without which they stay equal.
    """
    last = widen(network, copied, copied + more)
    swap(last, AllHeads, heads=copied + more)
    swap(network, Headed, copied=copied, spread=spread)
    headed = cast(Headed, network)
    last.bias.data = headed.spread_out(last.bias.data, copied + more)
    return headed
