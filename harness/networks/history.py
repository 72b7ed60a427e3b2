"""Networks that attend to earlier states of their trajectory (ARD, arXiv 2504.11295, sec. 3).

One forward pass serves training and sampling. It takes consecutive states of a trajectory and the
cached keys and values of the states before them. Training passes all states and an empty cache:
teacher forcing under a block mask. Sampling passes one state and the cache of earlier ones.

Both attend from one query block to its visible key blocks. So a masked pass equals cached steps,
and no masked product is computed.

It works on any backbone. The states of a trajectory are folded into the batch axis, so each has its
own time and everything but attention is as it was. Inside the self-attention of the lowest layers
the call of `scaled_dot_product_attention` is rerouted to one that unfolds the states.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from harness.diffusion.conditions import Condition
from harness.errors import UsageError
from harness.networks.backbones import Backbone
from harness.networks.layers import Attention
from harness.networks.linear_attention import LinearAttention, read
from harness.networks.masks import Visible, attend_blocks, causal, sum_blocks
from harness.networks.swapping import Swapped, swap


@dataclass(frozen=True)
class Cache:
    """Keys and values of the states so far, which sampling carries from step to step.

    Attributes:
        states: number of states.
        keys_values: keys and values [B, states, heads, T, head width] of each history layer; of a
            linear attention the sums alone [B, states, heads, head width + 1, head width].
    """

    states: int = 0
    keys_values: tuple[tuple[Tensor, ...], ...] = ()


EMPTY = Cache()


@dataclass
class Memory:
    """What a network, its history layers and its heads share during a pass.

    Attributes:
        visible: the block mask.
        heads: the heads of the steps, of which the first is None: the network's own.
        states: number of states S of the pass.
        before: number of states before.
    """

    visible: Visible
    heads: tuple[nn.Module | None, ...] = (None,)
    states: int = 0
    before: int = 0


class Remembers(Swapped, nn.Module):
    """A self-attention that sees the earlier states of its sample.

    It keeps what it adds to the cache, so that all history layers run the same compiled code.

    Attributes:
        past: what the cache has of this layer; nothing before the first state.
        kept: what the next cache has of it; nothing before its attention has run.
    """

    memory: Memory
    past: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]

    def joined(self, *own: Tensor) -> tuple[Tensor, ...]:
        """Each of `own` [B S, ...] as [B, states so far, ...], after that of the states before."""
        found = tuple(x.unflatten(0, (-1, self.memory.states)) for x in own)
        if self.past:
            found = tuple(torch.cat(pair, 1) for pair in zip(self.past, found, strict=True))
        self.kept = found
        return found

    def attend_states(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any
    ) -> Tensor:
        """In place of `scaled_dot_product_attention`, for tensors [B S, heads, T, head width]."""
        k, v = self.joined(key, value)
        q, memory = query.unflatten(0, (-1, self.memory.states)), self.memory
        out = attend_blocks(q, k, v, memory.before, memory.visible, attn_mask, **options)
        return out.flatten(0, 1)


def recalled(block: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """What puts the history layers of a block back to the states of now, inside its context."""
    layers = [layer for layer in block.modules() if isinstance(layer, Remembers)]
    now = [(layer, layer.past, layer.memory.states, layer.memory.before) for layer in layers]

    @contextmanager
    def again() -> Iterator[None]:
        later = [
            (layer.past, layer.kept, layer.memory.states, layer.memory.before) for layer in layers
        ]
        for layer, past, states, before in now:
            layer.past, layer.kept = past, ()
            layer.memory.states, layer.memory.before = states, before
        try:
            yield
        finally:
            for layer, (past, kept, states, before) in zip(layers, later, strict=True):
                layer.past, layer.kept = past, kept
                layer.memory.states, layer.memory.before = states, before

    return again


class Reroute(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` is that of a history layer.

    Raises UsageError at the second call.
    """

    def __init__(self, layer: Remembers):
        super().__init__()
        self.layer = layer

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            if self.layer.kept:
                raise UsageError(
                    "a history layer called torch's scaled_dot_product_attention twice, but must "
                    "call it once: give history_layers 0"
                )
            return self.layer.attend_states(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


class Remembering(Remembers, Attention):
    """Our self-attention, which sees the earlier states of its sample."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend_states(q, k, v)


class Summing(Remembers, LinearAttention):
    """Linear self-attention, which sees the earlier states of its sample."""

    def attend(self, q: Tensor, sums: Tensor) -> Tensor:
        (known,) = self.joined(sums)
        seen = sum_blocks(known, self.memory.before, self.memory.visible)
        return read(q, seen.flatten(0, 1))


class Rerouting(Remembers):
    """Any other self-attention, which sees the earlier states of its sample.

    A rerouted call costs some 50 microseconds, so ours has a method of its own.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with Reroute(self):
            return super().forward(*args, **kwargs)


FRONTS: dict[type[nn.Module], Any] = {Attention: Remembering, LinearAttention: Summing}
"""What takes the place of an attention in a history layer; of any other one it is `Rerouting`."""


class PerStep(Swapped, nn.Module):
    """The head of the first step, which gives each other state to the head of its own step."""

    memory: Memory

    def forward(self, *inputs: Tensor) -> Tensor:
        first, heads = self.memory.before, self.memory.heads
        states = [x.unflatten(0, (-1, self.memory.states)).unbind(1) for x in inputs]
        outputs = []
        for i, own in enumerate(zip(*states, strict=True)):
            head = heads[(first + i) % len(heads)]
            outputs.append(super().forward(*own) if head is None else head(*own))
        return torch.stack(outputs, 1).flatten(0, 1)


class History(Swapped, Backbone):
    """A backbone over trajectories of `num_states` states; `with_history` makes one.

    Attributes:
        num_states: number of states.
        history_layers: number of lowest layers that attend to earlier states (the paper's N).
    """

    num_states: int
    history_layers: int
    memory: Memory

    def forward(  # type: ignore[override]
        self, x: Tensor, time: Tensor, cond: Condition, cache: Cache = EMPTY
    ) -> tuple[Tensor, Cache]:
        """Raw network output for consecutive states.

        Args:
            x: states [B, S, C, H, W], of which the first follows the states in `cache`.
            time: [B, S], the schedule's `network_time` for each state.
            cond: conditions [B] as the network was built.
            cache: the cache that the call for the states before returned.

        Returns:
            Outputs [B, S, C', H, W], and a new cache with these states added.

        Raises:
            UsageError: if a history layer does not call `scaled_dot_product_attention` once.
        """
        memory, layers = self.memory, self.history_attentions
        memory.states, memory.before = x.shape[1], cache.states
        for layer, past in zip(layers, cache.keys_values or repeat(()), strict=False):
            layer.past, layer.kept = past, ()
        try:
            output = super().forward(  # type: ignore[safe-super]
                x.flatten(0, 1), time.flatten(), cond
            )
        finally:
            kept = tuple(layer.kept for layer in layers)
            for layer in layers:
                layer.past = layer.kept = ()
        if not all(kept):
            reached = [layer for layer, own in enumerate(kept) if own]
            raise UsageError(
                f"history_layers is {self.history_layers}, but the attentions of layers {reached} "
                "were reached: each history layer must call torch's scaled_dot_product_attention "
                "once; set no other attention backend, or give history_layers 0"
            )
        return output.unflatten(0, x.shape[:2]), Cache(cache.states + x.shape[1], kept)

    @property
    def history_attentions(self) -> list[Remembers]:
        """The attentions of the history layers, lowest first."""
        return cast(list[Remembers], list(self.attentions[: self.history_layers]))

    def head_of(self, state: int) -> nn.Module:
        """The head of a state."""
        return self.memory.heads[state % len(self.memory.heads)] or self.head

    def added_weights(self, teacher: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        """Where each step has a head, the first one too, so that no step differs from another."""
        found, heads = super().added_weights(teacher), len(self.memory.heads)
        first = set(map(id, self.head.parameters())) if heads > 1 else set()
        return found | {name: w for name, w in self.named_parameters() if id(w) in first}

    def load_teacher(self, state: dict[str, Tensor]) -> None:
        """Loads a plain network's weights; every head of a step becomes a copy of its head."""
        (own,) = (name for name, module in self.named_modules() if module is self.head)
        heads = {
            f"{self.head_name}{step}{key.removeprefix(own)}": value
            for step in range(2, len(self.memory.heads) + 1)
            for key, value in state.items()
            if key.startswith(f"{own}.")
        }
        super().load_teacher({**state, **heads})


def with_history(
    network: Backbone,
    num_states: int,
    history_layers: int,
    visible: Visible = causal,
    per_step_heads: bool = False,
) -> History:
    """A network as a student over trajectories of `num_states` states; its keys stay.

    Args:
        network: the network, which is changed in place.
        history_layers: number of lowest layers that attend to earlier states (the paper's N).
        visible: the block mask of those layers.
        per_step_heads: one head for each state, as in the released code, or one for all.

    Raises:
        ValueError: for more history layers than layers.
    """
    if not 0 <= history_layers <= network.depth:
        raise ValueError(
            f"history_layers is {history_layers}, but must be from 0 to the depth {network.depth}"
        )
    memory = Memory(visible)
    if per_step_heads and num_states > 1:
        copies = [copy.deepcopy(network.head) for _ in range(num_states - 1)]
        for step, head in enumerate(copies, 2):
            network.add_module(f"{network.head_name}{step}", head)
        memory.heads = (None, *copies)
        swap(network.head, PerStep, memory=memory)
    for attention in network.attentions[:history_layers]:
        front = next((FRONTS[kind] for kind in FRONTS if isinstance(attention, kind)), Rerouting)
        swap(attention, front, memory=memory, past=(), kept=())
    swap(network, History, num_states=num_states, history_layers=history_layers, memory=memory)
    return cast(History, network)
