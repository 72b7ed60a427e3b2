"""Checks that a method's loss suits its network and its sampler, level by level.

Each check takes a case and raises AssertionError. The first line of its docstring is what
`harness test-method` prints.

An error of the network moves x_0 by sigma / alpha if it predicts eps: 157 times at pure noise on
DiT's schedule. An unweighted loss of x_0 then trains the noisiest level alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from harness.methods.base import Method
from harness.training.case import Case
from harness.training.levels import Calls, by_level, looked_at, until_last
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

RUN = 1000
"""Steps of the run that is looked at."""
GRADIENTS, TIMES = (range(0, RUN, 85), 64), (range(0, RUN, 67), 128)
"""Steps and samples that the two checks look at; the strides meet each of a cycle's phases."""
BINS, LARGEST_RATIO = 20, 20.0
"""Bins of timesteps, and the bound of the gradient's ratio."""
NEAR, SMALLEST_SHARE = 0.05, 0.01
"""Distance of timesteps that count as one level, and the smallest share of a run there."""


def looks(
    case: Case, method: Method, steps: range, samples: int, last: str = ""
) -> Iterator[tuple[str, Tensor, Calls]]:
    """Each player's losses and calls in some steps of a run.

    Args:
        last: a player after whose last update the others are left out.
    """
    settings = TrainSettings(RUN, samples, 0, sample_group=case.config.sample_group)
    trainer = Trainer(method, case.sources, settings, None, case.device)
    for step in steps:
        (batch,) = trainer.batches.of_step(step)
        updates = method.updates(step)
        some = until_last(updates, last) if last else updates
        yield from looked_at(method, some, batch, settings)


def gradient_by_level(case: Case) -> None:
    """No level has more than 20 times the median level's gradient, for eps and v teachers.

    All steps and phases of a run count together. Levels with little gradient are not looked for:
    some papers' weights fall at high noise.
    """
    for teachers in case.teachers():
        method = teachers.build(num_steps=teachers.step_counts()[-1], total_steps=RUN)
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for player, loss, calls in looks(teachers, method, *GRADIENTS):
            found.setdefault(player, []).append((calls.times, calls.norms(loss)))
        for player, mine in found.items():
            times, norms = (torch.cat(parts) for parts in zip(*mine, strict=True))
            t = teachers.task.schedule.time_from_network(times)
            means = torch.tensor(list(by_level(t, norms, BINS).values()))
            worst, median = float(means.max()), float(means.median())
            assert worst <= LARGEST_RATIO * median, (
                f"{teachers.task.prediction_type} teacher: the gradient of {player} at one level "
                f"is {worst / max(median, 1e-30):.0f} times that of the median level; "
                "weight the loss by what the network's output does to it"
            )


def trained_levels(case: Case) -> None:
    """Every level at which a sampling step starts has 1 % of the training within 0.05."""
    for teachers in case.teachers():
        for num_steps in teachers.step_counts():
            method = teachers.build(num_steps=num_steps, total_steps=RUN)
            found = looks(teachers, method, *TIMES, "student")
            times = torch.cat([calls.times for name, _, calls in found if name == "student"])
            t = teachers.task.schedule.time_from_network(times)
            for level in method.levels[:-1].tolist():
                share = float(((t - level).abs() <= NEAR).double().mean())
                assert share >= SMALLEST_SHARE, (
                    f"{teachers.task.prediction_type} teacher, {num_steps} steps: a sampling step "
                    f"starts at t = {level:.2f}, near which lie {100 * share:.2f} % of the "
                    "training samples; give it 1 %"
                )
