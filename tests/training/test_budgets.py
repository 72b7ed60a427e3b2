"""Budgets in other units become steps; estimates of time do not depend on other programs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.errors import UsageError
from harness.runs.config import parse_config
from harness.runs.resolve import resolve
from harness.runs.run import Run
from harness.tasks import Task
from harness.training import estimate
from harness.training.estimate import (
    Blank,
    rehearsal,
    seconds_a_step,
    shortest,
    steps_within,
    total_flops,
)
from harness.training.settings import TrainSettings

CPU = torch.device("cpu")
GAN = {"history_layers": 2, "gan_from": 0.5, "gan_warmup_steps": 1, "gan_virtual_batch": 2}


def resolved(budget: str, **changes: Any) -> Any:
    return resolve(
        parse_config(
            {
                "method": "ard",
                "task": "tiny",
                "num_steps": 2,
                "budget": budget,
                "options": {"history_layers": 2},
                **changes,
            }
        )
    )


@pytest.mark.parametrize(
    "options", [{"history_layers": 2}, pytest.param(GAN, marks=pytest.mark.slow)]
)
def test_flops_are_those_of_the_bill(options: dict[str, Any], tiny: Task, tmp_path: Path) -> None:
    """The bill of the run stays within the budget; one step more would exceed it."""
    budget = 1e9
    asked = resolved(f"flops={budget}", options=options)
    steps = asked.settings.total_steps
    assert steps > 3
    record = Run(asked, tmp_path, CPU).execute()
    more = Run(resolved(f"steps={steps + 1}", options=options), tmp_path, CPU).execute()
    assert record.cost.training.trajectory_flops > 0
    assert record.cost.training.whole_flops <= budget < more.cost.training.whole_flops


@pytest.mark.parametrize(
    "share",
    [pytest.param(0.1, marks=pytest.mark.slow), pytest.param(0.25, marks=pytest.mark.slow), 0.3],
)
def test_flops_are_counted_on_each_kind_of_sample_in_its_share(share: float, tiny: Task) -> None:
    """Whatever the micro-batches are, and as on a whole batch."""

    def counted(share: float, **changes: Any) -> float:
        asked = resolved(
            "quick",
            method="shortcut",
            options={"bootstrap": share, "finest": 16, "bootstrap_guidance": 1},
            batch_size=40,
        )
        return total_flops(
            rehearsal(
                "shortcut",
                asked.config,
                tiny,
                2,
                replace(asked.settings, total_steps=1, **changes),
                CPU,
            )
        )

    found = counted(share)
    assert [
        counted(share, micro_batch_size=1),
        counted(share, micro_batch_size=20),
        counted(share, counted_samples=40),
    ] == [found] * 3
    assert 5 * counted(share, batch_size=8) == pytest.approx(found, rel=1e-12)
    none, whole = counted(0.0), counted(1.0)
    assert found == pytest.approx(none + share * (whole - none), rel=1e-9)
    assert whole > 1.3 * none


def test_a_stores_bill_is_counted_once_for_all_seeds(
    tiny: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    flops = estimate.count_flops
    monkeypatch.setattr(estimate, "count_flops", lambda run: (counted.append(1), flops(run))[1])
    monkeypatch.setattr(estimate, "BILLS", {})
    recipe, teacher = tiny.recipe, tiny.teacher(CPU)
    bills = [estimate.store_bill(teacher, replace(recipe, seed=seed), tiny) for seed in (0, 1, 0)]
    assert len(counted) == 1
    twice = estimate.store_bill(teacher, replace(recipe, count=2 * recipe.count), tiny)
    assert len(counted) == 2
    assert bills == [(twice[0] // 2, twice[1] / 2)] * 3


def test_equal_budgets_in_three_units_are_one_run(tiny: Task) -> None:
    steps = resolved("flops=3e8").settings.total_steps
    ids = {
        resolved(budget).run_id
        for budget in ("flops=3e8", "flops=300000000", f"steps={steps}", f"images={8 * steps}")
    }
    assert len(ids) == 1


def test_seconds_are_measured_steps(tiny: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.runs.budgets.seconds_a_step", lambda trainer: 0.25)
    assert resolved("seconds=10").settings.total_steps == 40
    assert resolved("seconds=10").run_id == resolved("steps=40").run_id


def test_a_steps_seconds_count_every_stage(tiny: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = rehearsal(
        "ard", resolved("quick", options=GAN).config, tiny, 2, TrainSettings(100, 8, 0), CPU
    )
    seen = []
    step = type(trainer).one_step
    monkeypatch.setattr(
        type(trainer), "one_step", lambda self: (seen.append(self.step), step(self))[1]
    )
    assert seconds_a_step(trainer) > 0
    assert seen == [0, 0, 0, 30, 30, 30, 60, 60, 60, 90, 90, 90]


class Clocks:
    """A clock of passing time and one of processor time; each call moves both."""

    def __init__(self, *calls: tuple[float, float]):
        self.passed, self.used, self.calls = 0.0, 0.0, iter(calls)
        self.both = (lambda: self.passed, lambda: self.used)

    def call(self, *_: object) -> None:
        passed, used = next(self.calls)
        self.passed += passed
        self.used += used


@pytest.mark.parametrize(
    ("calls", "seconds"),
    [
        ([(9.0, 1.2), (0.5, 0.9), (0.6, 0.9)], 0.5),  # an idle machine: two threads
        ([(9.0, 1.2), (4.0, 0.9), (6.0, 1.0)], 0.9),  # a busy one: threads wait
        ([(3.0, 2.0), (0.5, 0.9), (7.0, 0.9)], 0.5),  # idle for one call
    ],
    ids=["idle", "busy", "in part"],
)
def test_the_shortest_call_counts_without_waiting_for_a_core(
    calls: list[tuple[float, float]], seconds: float
) -> None:
    clocks = Clocks(*calls)
    assert shortest(clocks.call, CPU, 3, clocks.both) == pytest.approx(seconds)


def test_the_seconds_of_a_step_are_a_mean_over_the_run(
    tiny: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = rehearsal("ard", resolved("quick").config, tiny, 2, TrainSettings(100, 8, 0), CPU)
    clocks = Clocks(
        *((seconds, 99.0) for cost in (1.0, 2.0, 3.0, 6.0) for seconds in (9.0, cost, cost + 1))
    )
    monkeypatch.setattr(type(trainer), "one_step", clocks.call)
    assert seconds_a_step(trainer, clocks.both) == pytest.approx(3.0)


@pytest.mark.parametrize("budget", ["flops=1", "seconds=0", "images=7", "flops=0"])
def test_less_than_a_step_is_refused(budget: str, tiny: Task) -> None:
    with pytest.raises(UsageError, match="less than one training step"):
        resolved(budget)


def test_without_training_a_budget_costs_nothing(tiny: Task) -> None:
    ids = {
        resolved(budget, method="teacher", options={}).run_id
        for budget in ("flops=1e9", "seconds=3", "steps=7")
    }
    assert len(ids) == 1


def test_blank_trajectories_have_the_recipes_shape(tiny: Task) -> None:
    path = Blank(tiny.recipe, tiny.conditions).batch(torch.arange(3))
    assert path.states.shape == (3, 5, 1, 8, 8)
    assert path.predictions.shape == (3, 4, 1, 8, 8)
    assert path.steps == tiny.trajectory_steps


@pytest.mark.parametrize(
    ("flops", "expected"), [(99, 0), (100, 1), (1000, 9), (1049, 9), (1100, 10), (123_456, 1143)]
)
def test_the_search_finds_the_largest(
    flops: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of T steps costs 100 T and, in its second half, 16 more a step."""

    class Fake:
        def __init__(self, steps: int):
            self.steps, self.known_flops = steps, {}

    monkeypatch.setattr(
        estimate,
        "total_flops",
        lambda fake: 100 * fake.steps + 16 * (fake.steps - (fake.steps + 1) // 2),
    )
    assert steps_within(flops, Fake) == expected  # type: ignore[arg-type]
    assert total_flops is not estimate.total_flops
