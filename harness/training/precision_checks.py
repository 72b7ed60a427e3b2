"""The check of a method's gradients in mixed precision.

Like the other checks it takes a case and raises AssertionError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from harness.training.case import STEPS, Case
from harness.training.flops import loss_key, require_grad_of
from harness.training.settings import Precision, autocast

LEAST_COSINE = 0.7
"""Smallest cosine between the gradients of a parameter in fp32 and in bf16.

Gradients of independent rounding errors have 0. Most losses have over 0.99; one that subtracts two
close predictions of an eps network has down to 0.85.
"""
LEAST_SHARE = 0.01
"""Share of the norm of all gradients below which only the presence of a gradient counts."""

Gradients = dict[str, Tensor]
"""The gradients of a player's parameters, by name; zeros where there is none."""


def precision(case: Case) -> None:
    """Each parameter's gradients in fp32 and bf16 agree, also after a pass without gradient."""
    exact, rounded = (_gradients(case, precision) for precision in ("fp32", "bf16"))
    for update, gradients in exact.items():
        least = LEAST_SHARE * sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
        for name in (name for name, gradient in gradients.items() if bool(gradient.any())):
            one, other = (found[update][name].flatten() for found in (exact, rounded))
            what = f"{update}: in bf16 the gradient of {name}"
            assert bool(other.any()), f"{what} is missing"
            cosine = float(cosine_similarity(one, other, dim=0))
            assert float(one.norm()) < least or cosine >= LEAST_COSINE, (
                f"{what} has cosine {cosine:.2f} to that in fp32, "
                f"but at least {LEAST_COSINE} is asked"
            )


def _gradients(case: Case, precision: Precision) -> dict[str, Gradients]:
    """Gradients of every loss of a run at the initial weights, by the loss's name."""
    method, found = case.build(), dict[str, Gradients]()
    parameters = {name: p.trained for name, p in method.players.items()}
    for step in range(STEPS):
        updates = list(method.updates(step))
        if found.keys() >= set(map(loss_key, updates)):
            continue
        batch = case.batch(method)
        for update in updates:
            player = method.players[update.player]
            require_grad_of(parameters, update.player)
            with autocast(case.device, precision), _without_gradient_first(player.module):
                loss, _ = update.loss(batch)
            loss.backward()
            found[loss_key(update)] = {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for name, p in player.module.named_parameters()
            }
            player.optimizer.zero_grad(set_to_none=True)
    return found


@contextmanager
def _without_gradient_first(network: nn.Module) -> Iterator[None]:
    """Calls each layer of a network without gradient before every call with gradient.

    Autocast keeps a weight that it has cast until its context ends. Before torch 2.11 it kept one
    that was cast without gradient, and the weight was not trained.
    """

    def call(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            with torch.no_grad():
                layer.forward(*args)

    layers = [module for module in network.modules() if not list(module.children())]
    handles = [layer.register_forward_pre_hook(call) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
