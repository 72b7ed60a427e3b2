"""The coordinates that students of flow matching share."""

from __future__ import annotations

import pytest
import torch

from harness.diffusion.randomness import Keyed
from harness.diffusion.schedules import SCHEDULES
from harness.errors import UsageError
from harness.methods import METHODS
from harness.methods.base import Batch
from harness.methods.parts.student import flow_time, largest_sigma, time_of_flow
from harness.tasks import Task


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_flow_times_and_back(schedule: str) -> None:
    t = torch.tensor([0.001, 0.3, 0.7, 0.99], dtype=torch.float64)
    torch.testing.assert_close(
        time_of_flow(SCHEDULES[schedule](), flow_time(SCHEDULES[schedule](), t)),
        t,
        rtol=1e-9,
        atol=1e-9,
    )


def test_a_share_is_bootstrapped_late_in_a_long_run(tiny: Task) -> None:
    cls, step_sizes = METHODS["shortcut"], []
    method = cls(cls.Config(finest=16), tiny.teacher(torch.device("cpu")), tiny, 2, 10)
    method.s = lambda model, y, tau, step, cond: (step_sizes.append(step), y)[1]  # type: ignore[method-assign]
    items = torch.arange(16)
    for first in (0, 2**28):
        step_sizes.clear()
        method.loss(Batch(items + first, tiny.split.train.batch(items), None, Keyed("train", 0, 0)))
        assert int((step_sizes[-1] > 0).sum()) == 4


@pytest.mark.parametrize(
    ("method", "options", "complaint"),
    [
        ("ect", {"q": 256.0}, r"q is 256 and stages 8, but q \*\* stages must not exceed 1e\+06"),
        ("ect", {"stages": 64}, "q is 2 and stages 64"),
        (
            "ict",
            {"levels_from": 20, "levels_to": 10},
            "levels_from is 20, but must not exceed levels_to, which is 10",
        ),
    ],
)
def test_levels_that_come_too_close(method: str, options: dict, complaint: str, tiny: Task) -> None:
    cls = METHODS[method]
    cls.check(cls.Config(), tiny, 4)
    with pytest.raises(UsageError, match=complaint):
        cls.check(cls.Config(**options), tiny, 4)


def test_a_flows_pure_noise_is_its_own_time() -> None:
    flow, vp = SCHEDULES["flow"](), SCHEDULES["vp"]()
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert time_of_flow(flow, ends).tolist() == [1, 0]
    assert time_of_flow(vp, ends).tolist() == [1, 0]
    assert largest_sigma(flow) == 160
    assert 157 < largest_sigma(vp) < 158
