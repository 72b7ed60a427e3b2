"""The coordinates that students of flow matching share."""

from __future__ import annotations

import pytest
import torch

from harness.methods.student import flow_time, largest_sigma, time_of_flow
from harness.schedules import SCHEDULES


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_flow_times_and_back(schedule: str) -> None:
    t = torch.tensor([0.001, 0.3, 0.7, 0.99], dtype=torch.float64)
    torch.testing.assert_close(time_of_flow(SCHEDULES[schedule](), flow_time(SCHEDULES[schedule](), t)), t, rtol=1e-9, atol=1e-9)


def test_a_flows_pure_noise_is_its_own_time() -> None:
    flow, vp = SCHEDULES["flow"](), SCHEDULES["vp"]()
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert time_of_flow(flow, ends).tolist() == [1, 0]
    assert time_of_flow(vp, ends).tolist() == [1, 0]
    assert largest_sigma(flow) == 160
    assert 157 < largest_sigma(vp) < 158
