"""Exposure bias of samplers whose errors are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.diffusion.conditions import Condition
from harness.metrics.exposure import exposure_bias
from harness.solvers import Solver

COND = Condition(torch.zeros(3, dtype=torch.long))
LEVELS = torch.tensor([1.0, 0.6, 0.3, 0.0], dtype=torch.float64)
POINTS = torch.arange(4.0).reshape(1, 4, 1, 1, 1).expand(3, 4, 1, 2, 2)
"""The teacher's states: each step adds 1."""


class Adds(Solver):
    """Adds `step`, and `gain` times the sum of what it has been given before."""

    def __init__(self, step: float, gain: float = 0.0):
        self.size, self.gain = step, gain

    def init(self, model: None, x_T: Tensor, cond: Condition) -> Tensor:
        return torch.zeros_like(x_T)

    def step(
        self,
        model: None,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        cond: Condition,
        state: Tensor,
        noise: None,
    ) -> tuple:
        x_s = x_t + self.size + self.gain * state
        return x_s, x_s, state + x_t


def test_a_perfect_student_has_no_error() -> None:
    assert exposure_bias(Adds(1.0), None, POINTS, LEVELS, COND) == ([0.0] * 3, [0.0] * 3, [0.0] * 3)


def test_errors_add_up_on_the_own_history_alone() -> None:
    taught, own, drift = exposure_bias(Adds(1.5), None, POINTS, LEVELS, COND)
    assert taught == pytest.approx([0.5, 0.5, 0.5])
    assert own == pytest.approx([0.5, 1.0, 1.5])
    assert drift == pytest.approx([0.0, 0.5, 1.0])


def test_the_history_is_carried_in_both() -> None:
    taught, own, _ = exposure_bias(Adds(1.0, gain=0.1), None, POINTS, LEVELS, COND)
    # The teacher's states before the last step are 0 and 1.
    assert taught == pytest.approx([0.0, 0.0, 0.1])
    assert own[0] == taught[0]
