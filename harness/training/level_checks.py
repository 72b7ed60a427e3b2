"""Checks that a method's loss suits its network and its sampler, level by level.

Each check takes a case and raises AssertionError. The first line of its docstring is what
`harness test-method` prints.

An error of the network moves x_0 by sigma / alpha if it predicts eps: 157 times at pure noise on
DiT's schedule. An unweighted loss of x_0 then trains the noisiest level alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from harness.methods.base import Method
from harness.networks.backbones import Backbone
from harness.training.case import Case
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

RUN = 1000
"""Steps of the run that is looked at."""
GRADIENTS, TIMES = (range(0, RUN, 85), 64), (range(0, RUN, 67), 128)
"""Steps and samples that the two checks look at; the strides meet each of a cycle's phases."""
POOL = 2**21
"""Numbers in the outputs of all calls of one loss."""
BINS, FEWEST, LARGEST_RATIO = 20, 4, 20.0
"""Bins of timesteps, samples that a bin needs, and the bound of the gradient's ratio."""
NEAR, SMALLEST_SHARE = 0.05, 0.01
"""Distance of timesteps that count as one level, and the smallest share of a run there."""


@dataclass
class Calls:
    """The calls of a network with gradients: timesteps, and what reaches its output.

    Zeros are added to every output. They come from one pool that is made beforehand, because a
    tensor that is made inside of a forward-mode derivative gets no gradient.
    """

    times: list[Tensor] = field(default_factory=list)
    places: list[tuple[int, torch.Size]] = field(default_factory=list)
    pool: Tensor = field(default_factory=lambda: torch.zeros(POOL, requires_grad=True))
    used: int = 0

    def add(self, time: Any, output: Tensor) -> Tensor:
        """Notes a call at network times [B] or [B, S] and returns its output plus zeros.

        The output may be that of several heads: B rows of each.
        """
        # Inside of a forward-mode derivative a time is a pair; its value is wanted.
        value = torch.tensor(time.tolist(), dtype=torch.float64)
        heads = len(output) // len(value)
        self.times.append(value.repeat(heads, *[1] * (value.dim() - 1)))
        self.places.append((self.used, output.shape))
        zeros = self.pool[self.used : self.used + output.numel()].view(output.shape)
        self.used += output.numel()
        return output + zeros

    @property
    def timesteps(self) -> Tensor:
        """Network times of all samples and states [n], float64."""
        return torch.cat([time.flatten() for time in self.times])

    @property
    def norms(self) -> Tensor:
        """Norms [n] of the loss's gradient in the outputs of these samples and states."""
        found = []
        assert self.pool.grad is not None
        for time, (start, shape) in zip(self.times, self.places, strict=True):
            gradient = self.pool.grad[start : start + shape.numel()].view(shape)
            found.append(gradient.flatten(time.dim()).norm(dim=-1).flatten())
        return torch.cat(found)


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


def looks(
    case: Case, method: Method, steps: range, samples: int, last: str = ""
) -> Iterator[tuple[str, Calls]]:
    """Each player's calls in some steps of a run, after the loss's backward pass.

    Args:
        last: a player after whose last update the others are left out, and backward passes too.
    """
    settings = TrainSettings(RUN, samples, 0, sample_group=case.config.sample_group)
    trainer = Trainer(method, case.sources, settings, None, case.device)
    for step in steps:
        (batch,) = trainer.batches.of_step(step)
        updates = list(method.updates(step))
        while last and updates and updates[-1].player != last:
            updates.pop()
        for update in updates:
            for name, player in method.players.items():
                player.module.requires_grad_(name == update.player)
            module = method.players[update.player].module
            with watched(module) as calls:
                loss = update.loss(batch)[0]
                if not last:
                    loss.backward()
            module.zero_grad(set_to_none=True)
            if calls.times:
                yield update.player, calls


def gradient_by_level(case: Case) -> None:
    """No level has more than 20 times the median level's gradient, for eps and v teachers.

    All steps and phases of a run count together. Levels with little gradient are not looked for:
    some papers' weights fall at high noise.
    """
    for teachers in case.teachers():
        method = teachers.build(num_steps=teachers.step_counts()[-1], total_steps=RUN)
        found: dict[str, list[Calls]] = {}
        for player, calls in looks(teachers, method, *GRADIENTS):
            found.setdefault(player, []).append(calls)
        for player, mine in found.items():
            times = torch.cat([calls.timesteps for calls in mine])
            t = teachers.task.schedule.time_from_network(times)
            norms = by_level(t, torch.cat([calls.norms for calls in mine]))
            worst, median = float(norms.max()), float(norms.median())
            assert worst <= LARGEST_RATIO * median, (
                f"{teachers.task.prediction_type} teacher: the gradient of {player} at one level "
                f"is {worst / max(median, 1e-30):.0f} times that of the median level; "
                "weight the loss by what the network's output does to it"
            )


def by_level(t: Tensor, norms: Tensor) -> Tensor:
    """Mean norms in bins of timesteps t [n] that hold enough samples."""
    place = (t * BINS).long().clamp(0, BINS - 1)
    found = [norms[place == bin] for bin in range(BINS)]
    return torch.stack([mine.mean() for mine in found if len(mine) >= FEWEST])


def trained_levels(case: Case) -> None:
    """Every level at which a sampling step starts has 1 % of the training within 0.05."""
    for teachers in case.teachers():
        for num_steps in teachers.step_counts():
            method = teachers.build(num_steps=num_steps, total_steps=RUN)
            found = looks(teachers, method, *TIMES, "student")
            times = torch.cat([calls.timesteps for name, calls in found if name == "student"])
            t = teachers.task.schedule.time_from_network(times)
            for level in method.levels[:-1].tolist():
                share = float(((t - level).abs() <= NEAR).double().mean())
                assert share >= SMALLEST_SHARE, (
                    f"{teachers.task.prediction_type} teacher, {num_steps} steps: a sampling step "
                    f"starts at t = {level:.2f}, near which lie {100 * share:.2f} % of the "
                    "training samples; give it 1 %"
                )
