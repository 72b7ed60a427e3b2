"""What the ranks of one run tell each other in a training step.

Each rank takes the mean over its share of the batch. The mean over the ranks is the mean over the
whole batch, since all shares are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from harness import ranks
from harness.errors import UsageError
from harness.training.sharding import is_part


def share_of(batch_size: int, sample_group: int) -> int:
    """Samples of a batch for each rank. Raises UsageError if the ranks cannot share it equally."""
    if batch_size % (ranks.count() * sample_group):
        raise UsageError(
            f"batch_size is {batch_size}, but {ranks.count()} ranks share it in groups of "
            f"{sample_group}: give a multiple of {ranks.count() * sample_group}"
        )
    return batch_size // ranks.count()


def mean_over_ranks(
    parameters: Sequence[nn.Parameter], metrics: dict[str, Tensor], passes: int
) -> tuple[dict[str, Tensor], int]:
    """Averages the gradients of a player in place, with its metrics, in one message.

    Those of sharded weights are averaged already.

    A parameter that no rank's loss reaches keeps None as its gradient.

    Args:
        metrics: scalars by name, equal names on all ranks.
        passes: passes of the teacher on this rank.

    Returns:
        The metrics averaged, and the passes of all ranks.
    """
    if ranks.count() == 1:
        return metrics, passes
    device = parameters[0].device
    parameters = [p for p in parameters if not is_part(p)]  # the others are averaged
    noted = [float(passes), *(float(p.grad is not None) for p in parameters)]
    counts = torch.tensor(noted, device=device)
    names = sorted(metrics)
    means = [metrics[name].clone() for name in names]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    ranks.add([*(p.grad for p in parameters if p.grad is not None), *means, counts])
    total, *reached = counts.tolist()
    for parameter, by_some in zip(parameters, reached, strict=True):
        if by_some and parameter.grad is not None:
            parameter.grad /= ranks.count()
        else:
            parameter.grad = None
    found = {name: mean / ranks.count() for name, mean in zip(names, means, strict=True)}
    return found, round(total)
