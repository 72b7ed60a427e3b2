"""A DiT that attends to earlier states of its trajectory (ARD, arXiv 2504.11295, sec. 3).

One forward pass serves training and sampling. It takes consecutive states of a trajectory and the
cached keys and values of the states before them. Training passes all states and an empty cache:
teacher forcing under a block mask. Sampling passes one state and the cache of earlier ones.

Both attend from one query block to its visible key blocks. So a masked pass equals cached steps,
and no masked product is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.networks.dit import Trunk
from harness.networks.layers import FinalLayer, attend_within

Visible = Callable[[int], tuple[int, ...]]
"""From a query block (0 = noise) to its visible key blocks, in ascending order, itself last."""


@dataclass(frozen=True)
class Cache:
    """Keys and values of the states so far, which sampling carries from step to step.

    Attributes:
        states: number of states.
        keys_values: keys and values [B, states, heads, T, head width] of each history layer.
    """

    states: int = 0
    keys_values: tuple[tuple[Tensor, Tensor], ...] = ()


EMPTY = Cache()


def causal(query: int) -> tuple[int, ...]:
    """The paper's mask M4: all states so far."""
    return tuple(range(query + 1))


def window(depth: int) -> Visible:
    """The paper's mask M2: itself and the `depth` states before; depth 0 is M1, the diagonal."""
    return lambda query: tuple(range(max(0, query - depth), query + 1))


def keep_first(query: int) -> tuple[int, ...]:
    """The paper's mask M3: itself and the noise."""
    return (0, query) if query else (0,)


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, first: int, visible: Visible) -> Tensor:
    """Attention of each state's tokens on the tokens of its visible states.

    Args:
        q: queries [B, S, heads, T, head width] of states first .. first + S - 1.
        k, v: keys and values of all states so far [B, first + S, heads, T, head width].

    Returns:
        Attended values of the shape of q.
    """

    def keys(x: Tensor, blocks: tuple[int, ...]) -> Tensor:
        chosen = (
            x[:, blocks[0] : blocks[-1] + 1]
            if len(blocks) == blocks[-1] - blocks[0] + 1
            else x[:, list(blocks)]
        )
        return chosen.transpose(1, 2).flatten(2, 3)

    outputs = []
    for i in range(q.shape[1]):
        blocks = visible(first + i)
        outputs.append(F.scaled_dot_product_attention(q[:, i], keys(k, blocks), keys(v, blocks)))
    return torch.stack(outputs, 1)


class HistoryDiT(Trunk):
    """A DiT over trajectories of `num_states` states.

    Args:
        history_layers: number of lowest layers that attend to earlier states (the paper's N).
        visible: the block mask of those layers.
        per_step_heads: one final layer for each state (`final_layer`, `final_layer2`, ...), as
            in the released code, or one for all.
        options: arguments of `Trunk`.
    """

    def __init__(
        self,
        num_states: int,
        history_layers: int,
        visible: Visible = causal,
        per_step_heads: bool = False,
        **options: Any,
    ):
        super().__init__(**options)
        if not 0 <= history_layers <= self.depth:
            raise ValueError(
                f"history_layers is {history_layers}, but must be from 0 to the depth {self.depth}"
            )
        self.num_states, self.history_layers, self.visible = num_states, history_layers, visible
        self._head_names = ["final_layer"]
        if per_step_heads:
            self._head_names += [f"final_layer{i}" for i in range(2, num_states + 1)]
        for name in self._head_names[1:]:
            self.add_module(name, copy.deepcopy(self.final_layer))

    def head(self, state: int) -> FinalLayer:
        """The final layer of a state."""
        return getattr(self, self._head_names[state % len(self._head_names)])

    def load_teacher(self, state: dict[str, Tensor]) -> None:
        """Loads a DiT's weights.

        Every per-step head becomes a copy of the final layer. Weights of extra channels are zero.
        """
        heads = {
            name + key.removeprefix("final_layer"): value
            for name in self._head_names
            for key, value in state.items()
            if key.startswith("final_layer.")
        }
        patch = "x_embedder.proj.weight"
        widened = torch.zeros_like(self.x_embedder.proj.weight)
        widened[:, : state[patch].shape[1]] = state[patch]
        super().load_teacher({**state, **heads, patch: widened})

    def forward(
        self, x: Tensor, t: Tensor, cond: Condition, cache: Cache = EMPTY
    ) -> tuple[Tensor, Cache]:
        """Raw network output for consecutive states.

        Args:
            x: states [B, S, C, H, W], of which the first follows the states in `cache`.
            t: [B, S], the input of the time embedding for each state.
            cond: labels [B], text [B, L, width] and scalars [B], as the network was built.
            cache: the cache that the call for the states before returned.

        Returns:
            Outputs [B, S, C', H, W], and a new cache with these states added.
        """
        c = self.conditioning(t, cond)
        h = self.tokens(x)
        grown = []
        for index, block in enumerate(self.blocks):
            if index >= self.history_layers:
                h = block(h, c, attend_within, cond.text)
                continue
            past = cache.keys_values[index] if cache.states else None

            def attend(
                q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] | None = past
            ) -> Tensor:
                if past is not None:
                    k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
                grown.append((k, v))
                return attend_blocks(q, k, v, cache.states, self.visible)

            h = block(h, c, attend, cond.text)
        return self._outputs(h, c, cache.states), Cache(cache.states + x.shape[1], tuple(grown))

    def _outputs(self, h: Tensor, c: Tensor, first: int) -> Tensor:
        if len(self._head_names) == 1:
            return self.image(self.final_layer(h, c))
        states = range(h.shape[1])
        return self.image(torch.stack([self.head(first + i)(h[:, i], c[:, i]) for i in states], 1))
