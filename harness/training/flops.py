"""FLOPs of a method's losses, counted on a few samples without changing the method."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from harness.diffusion.counting import count_flops
from harness.methods.base import Method, Update
from harness.networks.compiling import uncompiled
from harness.networks.recomputing import activations_kept
from harness.training.batches import Batches

Parameters = Mapping[str, Sequence[nn.Parameter]]
"""The parameters of each player, by the player's name."""


def loss_key(update: Update) -> str:
    """The name of an update's loss, such as "student/gan"."""
    return f"{update.player}/{update.phase}"


def loss_flops(
    method: Method,
    parameters: Parameters,
    updates: Sequence[Update],
    batches: Batches,
    step: int,
) -> dict[str, float]:
    """FLOPs per sample of each loss and its backward pass, by `loss_key`.

    They are counted on a few samples, in micro-batches like those of a step.
    """
    settings, found = batches.settings, dict[str, float]()
    group, size = settings.sample_group, settings.batch_size
    few = -(-settings.counted_samples // group) * group
    parts = torch.arange(few).split(settings.micro_batch_size or size)
    small = [batches.of_samples(step, part) for part in parts]

    def count(update: Update) -> None:
        # The counter does not see FLOPs inside a compiled graph, and would count a block that runs
        # again twice.
        with uncompiled(settings.compile), activations_kept():
            flops = sum(
                count_flops(partial(lambda batch: update.loss(batch)[0].backward(), batch))
                for batch in small
            )
        found.setdefault(loss_key(update), flops / few)

    rehearse(method, parameters, updates, count)
    return found


def rehearse(
    method: Method,
    parameters: Parameters,
    updates: Sequence[Update],
    call: Callable[[Update], object],
) -> None:
    """Calls all updates of a step and then restores the method's own state.

    The updates are called in order, since one may use the carry of another.
    """
    with unchanged(method):
        for update in updates:
            require_grad_of(parameters, update.player)
            call(update)
            method.players[update.player].optimizer.zero_grad(set_to_none=True)


@contextmanager
def unchanged(method: Method) -> Iterator[None]:
    """Restores the method's own state, which losses may change, at the end of the block."""
    state = copy.deepcopy(method.state_dict())
    try:
        yield
    finally:
        method.load_state_dict(state)


def require_grad_of(parameters: Parameters, name: str) -> None:
    """Turns `requires_grad` on for one player alone."""
    for other, theirs in parameters.items():
        for parameter in theirs:
            parameter.requires_grad_(other == name)
