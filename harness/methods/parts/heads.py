"""The velocities of networks whose last layer has several heads (`networks/parallel.py`)."""

from __future__ import annotations

from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Denoiser, predict
from harness.methods.parts.student import velocity


def block_velocities(
    model: Denoiser, x_t: Tensor, t: Tensor, cond: Condition, first: Tensor, last: Tensor
) -> Tensor:
    """A model's mean velocities over R blocks of heads for each sample, [R, B, C, H, W].

    Args:
        x_t: points [B, C, H, W] at timesteps t [B].
        first, last: the first head of each block, and the one after its last, int64 [R, B] each.
    """
    count, schedule = len(first), model.schedule
    cond = cond.with_scalars(first=first.flatten(), last=last.flatten())
    output = model.network(x_t, schedule.network_time(t), cond)[:, : x_t.shape[1]]
    points = x_t.repeat(count, 1, 1, 1)
    found = predict(output, points, t.repeat(count), schedule, model.prediction_type)
    return velocity(found).unflatten(0, (count, -1))
