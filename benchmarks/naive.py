"""ARD's training pass as the released code does it: the baseline in timing ours.

All states form one sequence, every layer has a dense mask, and adaLN runs once per token. With the
same weights it computes what `History` computes; `test_speed.py` compares both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.networks.history import History
from harness.networks.layers import Block, modulate


def dense_mask(network: History, states: int, tokens: int, history: bool) -> Tensor:
    """The boolean attention mask [S T, S T].

    A token sees its own block and, with `history`, the earlier blocks visible to it.
    """
    blocks = torch.zeros(states, states, dtype=torch.bool)
    for query in range(states):
        blocks[query, list(network.memory.visible(query)) if history else [query]] = True
    return blocks.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


def naive_block(block: Block, x: Tensor, c: Tensor, mask: Tensor) -> Tensor:
    """One block on [B, S T, d] under a conditioning vector for each token [B, S T, d]."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, -1)
    q, k, v = (
        block.attn.qkv(modulate(block.norm1(x), shift1, scale1))
        .unflatten(-1, (3, block.attn.num_heads, -1))
        .permute(2, 0, 3, 1, 4)
    )
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    x = x + gate1 * block.attn.proj(attended)
    return x + gate2 * block.mlp(modulate(block.norm2(x), shift2, scale2))


class NaiveHistory(nn.Module):
    """The naive forward pass of a history DiT, on that network's weights."""

    def __init__(self, network: History):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """[B, S, C, H, W] at times [B, S] under conditions -> [B, S, C', H, W]; shared heads."""
        network: Any = self.network
        states = t.shape[1]
        h = network.tokens(x.flatten(0, 1))
        tokens = h.shape[1]
        c = network.conditioning(t.flatten(), cond).unflatten(0, t.shape)
        c = c.repeat_interleave(tokens, 1)
        masks = [
            dense_mask(network, states, tokens, history).to(h.device) for history in (True, False)
        ]
        h = h.unflatten(0, t.shape).flatten(1, 2)
        for index, block in enumerate(network.blocks):
            h = naive_block(block, h, c, masks[0] if index < network.history_layers else masks[1])
        final = network.final_layer
        shift, scale = final.adaLN_modulation(c).chunk(2, -1)
        out = final.linear(modulate(final.norm_final(h), shift, scale))
        return network.image(out.unflatten(1, (states, tokens)).flatten(0, 1)).unflatten(0, t.shape)
