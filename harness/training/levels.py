"""How much of a loss's gradient each noise level has.

It is looked at where it reaches a network's output: there each sample, and each state of a
trajectory, has a level of its own, and no pass back through the network is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from harness.diffusion.schedules import Schedule
from harness.methods.base import Batch, Method, Update
from harness.networks.backbones import Backbone
from harness.networks.compiling import uncompiled
from harness.training.batches import Batches
from harness.training.flops import require_grad_of, unchanged
from harness.training.settings import TrainSettings, autocast

FEWEST = 4
"""Samples or states that a part of the timesteps needs."""
EDGE = 1e-4
"""Share of a part below its edge that counts as the edge: network times are rounded."""
PARTS, UPDATES, SAMPLES = 8, 8, 16
"""Of what a tracker is told: parts of the timesteps, updates of the student, samples for each."""


@dataclass
class Call:
    """One call of a network.

    Attributes:
        times: network times of all samples and states [n], float64.
        norms: norms [n] of the loss's gradient in their outputs; 0 where none came.
    """

    times: Tensor = field(init=False)
    norms: Tensor = field(init=False)
    states: int = field(init=False)

    def begin(self, time: Tensor, rows: int) -> None:
        """Notes network times [B] or [B, S], and B rows for each head of the output."""
        heads, self.states = rows // len(time), time.dim()
        self.times = time.detach().to("cpu", torch.float64).flatten().repeat(heads)
        self.norms = torch.zeros(len(self.times))

    def reach(self, gradient: Tensor) -> None:
        """Notes the gradient of the output."""
        found = gradient.detach().float().flatten(self.states).norm(dim=-1)
        self.norms = found.flatten().cpu()


class Noted(torch.autograd.Function):
    """Leaves a network's output as it is, and notes its times and what gradient reaches it.

    The gradient is asked for at a scalar, the anchor, so the backward pass ends here. Inside of a
    forward-mode derivative output and time are no plain tensors, but here they are.
    """

    @staticmethod
    def forward(output: Tensor, time: Tensor, anchor: Tensor, call: Call) -> Tensor:
        call.begin(time, len(output))
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.none, ctx.call = torch.zeros_like(inputs[2]), inputs[3]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.call.reach(gradient)
        return gradient, None, ctx.none, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *rest: Any) -> Tensor:
        return tangent.view_as(tangent)


class Calls:
    """The calls of a network with gradients: timesteps, and what reaches its output."""

    def __init__(self) -> None:
        self.all, self.anchor = list[Call](), torch.zeros((), requires_grad=True)

    def add(self, time: Tensor, output: Tensor) -> Tensor:
        """Notes a call at network times [B] or [B, S] and returns its output."""
        self.all.append(Call())
        return Noted.apply(output, time, self.anchor, self.all[-1])

    @property
    def times(self) -> Tensor:
        """Network times of all samples and states [n], float64."""
        return torch.cat([call.times for call in self.all])

    def norms(self, loss: Tensor) -> Tensor:
        """Norms [n] of the loss's gradient in the outputs of these samples and states."""
        for call in self.all:  # a loss may have asked for gradients of its own
            call.norms.zero_()
        torch.autograd.grad(loss, self.anchor, allow_unused=True)
        return torch.cat([call.norms for call in self.all])


@contextmanager
def watched(module: nn.Module) -> Iterator[Calls]:
    """Notes the calls of a player's transformer that the loss can change."""
    calls = Calls()

    def note(network: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        if isinstance(output, tuple):
            return calls.add(args[1], output[0]), *output[1:]
        return calls.add(args[1], output)

    handles = [m.register_forward_hook(note) for m in module.modules() if isinstance(m, Backbone)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def until_last(updates: Iterable[Update], player: str) -> list[Update]:
    """The updates of a step up to the last one of a player; none if it has none."""
    found = list(updates)
    while found and found[-1].player != player:
        found.pop()
    return found


def looked_at(
    method: Method, updates: Iterable[Update], batch: Batch, settings: TrainSettings
) -> Iterator[tuple[str, Tensor, Calls]]:
    """For each update in order: its player, the loss, and the calls of the player's network.

    An update whose loss calls no transformer of its player is left out.
    """
    parameters = {name: player.trained for name, player in method.players.items()}
    for update in updates:
        require_grad_of(parameters, update.player)
        with (
            watched(method.players[update.player].module) as calls,
            autocast(batch.index.device, settings.precision),
        ):
            loss = update.loss(batch)[0]
        if calls.all:
            yield update.player, loss, calls


def by_level(t: Tensor, norms: Tensor, parts: int) -> dict[int, float]:
    """Mean norms in those of so many equal parts of the timesteps t [n] that hold enough of them.

    Parts are numbered from clean data; an edge belongs to the noisier one.
    """
    place = (t * parts + EDGE).long().clamp(0, parts - 1)
    found = {part: norms[place == part] for part in range(parts)}
    return {part: float(mine.mean()) for part, mine in found.items() if len(mine) >= FEWEST}


def gradient_norms(
    method: Method, batches: Batches, schedule: Schedule, step: int
) -> dict[str, float]:
    """The gradient norm of the student's loss by noise level, at the present weights.

    It is the norm in the network's output of a sample's own loss, in the mean over the samples and
    states of a part of the timesteps. The losses are those of the student's next updates, in which
    a method may go through a cycle, or of its last ones at the end of the run. Samples, noise and
    timesteps are the same at every step, since they are those of the run's first samples. The
    method stays as it is.

    Args:
        step: how many steps the run has made.

    Returns:
        Norms by the timesteps' thousandths, such as "gradient_norm_000_125".
    """
    settings, total = batches.settings, batches.settings.total_steps
    own = Batches(method, batches.sources, settings, batches.device)  # training's read on
    group = settings.sample_group
    size = -(-SAMPLES // group) * group
    times, norms = [], []
    order = chain(range(step, total), reversed(range(step)))
    updates = (until_last(method.updates(number), "student") for number in order)
    with uncompiled(settings.compile), unchanged(method):
        for place, some in enumerate(islice(filter(None, updates), UPDATES)):
            index = torch.arange(place * size, (place + 1) * size)
            for part in index.split(settings.micro_batch_size or own.share):
                found = looked_at(method, some, own.of_samples(0, part), settings)
                for player, loss, calls in found:
                    if player == "student":
                        times.append(calls.times)
                        norms.append(calls.norms(loss) * len(part))
    if not times:
        return {}
    t = schedule.time_from_network(torch.cat(times))
    return {
        f"gradient_norm_{1000 * part // PARTS:03}_{1000 * (part + 1) // PARTS:03}": norm
        for part, norm in by_level(t, torch.cat(norms), PARTS).items()
    }
