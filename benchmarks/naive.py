"""ARD's training pass as the released code does it: the baseline in timing `HistoryDiT`.

All states form one sequence, every layer has a dense mask, and adaLN runs once per token. With the
same weights it computes what `HistoryDiT` computes; `test_speed.py` compares both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.diffusion.conditions import Condition
from harness.networks.history import HistoryDiT
from harness.networks.layers import Block, modulate


def dense_mask(network: HistoryDiT, states: int, tokens: int, history: bool) -> Tensor:
    """The boolean attention mask [S T, S T].

    A token sees its own block and, with `history`, the earlier blocks visible to it.
    """
    blocks = torch.zeros(states, states, dtype=torch.bool)
    for query in range(states):
        blocks[query, list(network.visible(query)) if history else [query]] = True
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

    def __init__(self, network: HistoryDiT):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """[B, S, C, H, W] at times [B, S] under conditions -> [B, S, C', H, W]; shared heads."""
        network, states = self.network, t.shape[1]
        h = network.tokens(x)
        tokens = h.shape[2]
        c = network.conditioning(t, cond)
        c = c.repeat_interleave(tokens, 1)
        masks = [
            dense_mask(network, states, tokens, history).to(h.device) for history in (True, False)
        ]
        h = h.flatten(1, 2)
        for index, block in enumerate(network.blocks):
            assert isinstance(block, Block)
            h = naive_block(block, h, c, masks[0] if index < network.history_layers else masks[1])
        final = network.final_layer
        shift, scale = final.adaLN_modulation(c).chunk(2, -1)
        out = final.linear(modulate(final.norm_final(h), shift, scale))
        return network.image(out.unflatten(1, (states, tokens)))
