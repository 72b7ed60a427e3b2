"""Exposure bias: what a student loses because it sees its own states instead of the teacher's.

Each step's error is measured twice: after earlier states of the teacher, and after the student's
own. ARD sets out to close the gap between the two (arXiv 2504.11295, sec. 3.1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.solvers import Solver


@torch.no_grad()
def exposure_bias(
    solver: Solver, model: Any, points: Tensor, levels: Tensor, cond: Condition
) -> tuple[list[float], ...]:
    """Root mean squared error per pixel after each of S steps.

    Args:
        points: the teacher's states at the student's levels, [B, S + 1, C, H, W], noise first.
        levels: timesteps of the points, [S + 1].

    Returns:
        S errors on the teacher's history, S errors on the student's own history, and S distances
        between the two predictions. The first two errors are equal.
    """
    x, own_state, taught_state = (
        points[:, 0],
        *(solver.init(model, points[:, 0], cond) for _ in range(2)),
    )
    on_teachers, on_own, drift = [], [], []
    for i in range(len(levels) - 1):
        t, s = levels[i], levels[i + 1]
        taught, _, taught_state = solver.step(model, points[:, i], t, s, cond, taught_state, None)
        x, _, own_state = solver.step(model, x, t, s, cond, own_state, None)
        on_teachers.append(_rms(taught - points[:, i + 1]))
        on_own.append(_rms(x - points[:, i + 1]))
        drift.append(_rms(x - taught))
    return on_teachers, on_own, drift


def _rms(difference: Tensor) -> float:
    return float(difference.double().square().mean().sqrt())
