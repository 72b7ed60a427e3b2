"""Memory of training, counted without running it: weights, and what a backward pass needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from harness.methods import Method
from harness.methods.base import Batch, Update
from harness.training.estimate import PARTS
from harness.training.flops import rehearse
from harness.training.settings import autocast
from harness.training.trainer import Trainer

WORD = 4
"""Bytes of a number in float32."""


@dataclass(frozen=True)
class Memory:
    """Bytes that training needs on one device.

    Attributes:
        networks: weights of all networks; gradients and two moments of those that are trained, all
            in float32.
        sample: what a backward pass needs of the forward passes, for each sample of a micro-batch.
    """

    networks: int
    sample: float

    def of(self, micro_batch: int) -> float:
        """Both together."""
        return self.networks + self.sample * micro_batch


def networks_bytes(method: Method, teacher: nn.Module) -> int:
    """Bytes of a method's networks and its teacher; trained numbers count four times (AdamW)."""
    players = method.players.values()
    trained = _parameters(p for player in players for p in player.trained)
    averages = [player.ema.module for player in players if player.ema]
    held = [value for value in vars(method).values() if isinstance(value, nn.Module)]
    modules = (teacher, *held, *averages, *(player.module for player in players))
    every = _parameters(p for module in modules for p in module.parameters())
    frozen = sum(p.numel() for key, p in every.items() if key not in trained)
    return WORD * (4 * sum(p.numel() for p in trained.values()) + frozen)


def _parameters(found: Iterable[nn.Parameter]) -> dict[int, nn.Parameter]:
    return {id(parameter): parameter for parameter in found}


class Fused(torch.autograd.Function):
    """An attention without values that keeps what a fused one keeps: no table of weights."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        *batch, heads, tokens, _ = q.shape
        output = q.new_empty(*batch, tokens, heads, v.shape[-1]).transpose(-3, -2)  # as kernels do
        ctx.save_for_backward(q, k, v, output, q.new_empty(q.shape[:-1]))
        return output


class AsFused(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` on the meta device is `Fused`."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        if function is F.scaled_dot_product_attention and named["query"].is_meta:
            return Fused.apply(named["query"], named["key"], named["value"])
        return function(*args, **(kwargs or {}))


def kept_bytes(run: Callable[[], Any], weights: Iterable[Tensor] = ()) -> int:
    """Bytes of the tensors that `run()` keeps for its backward pass, on any device.

    Args:
        weights: tensors that are there anyway, and do not count.
    """
    own = {weight.untyped_storage()._cdata for weight in weights}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other one takes its place
        return tensor

    with AsFused(), saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    del result
    return sum(storage.nbytes() for storage in kept.values())


def loss_bytes(trainer: Trainer) -> float:
    """Bytes that the largest loss of a run keeps, for each sample of a micro-batch."""
    method, settings, found = trainer.method, trainer.settings, list[float]()
    few = -(-2 // settings.sample_group) * settings.sample_group
    weights = [p for player in method.players.values() for p in player.module.parameters()]
    parameters = {name: list(p.module.parameters()) for name, p in method.players.items()}
    for step in sorted({int(part * settings.total_steps) for part in PARTS}):
        batch = trainer.batches.of_samples(step, torch.arange(few))

        def count(update: Update, batch: Batch = batch) -> None:
            with autocast(trainer.device, settings.precision):
                found.append(kept_bytes(lambda: update.loss(batch)[0], weights) / few)

        rehearse(method, parameters, list(method.updates(step)), count)
    return max(found)
