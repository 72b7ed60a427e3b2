"""rCM: sCM's tangent with a rise of its own, and distribution matching of simulated samples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gaussian import STD, Exact, Model, batches, built, end, fading, posterior

SCHEDULES = ["flow", "vp"]


def tangent(formula: Exact, schedule: str, r: float) -> float:
    (batch,) = batches(1, schedule=schedule)
    return float(built("rcm", formula, schedule).consistency(batch, r)[1]["tangent"])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_its_tangent_is_0_at_the_teachers_ends_and_before_the_rise_at_the_teacher(
    schedule: str,
) -> None:
    assert tangent(end, schedule, 1.0) < 1e-6 * tangent(fading, schedule, 1.0)
    assert tangent(posterior, schedule, 0.0) < 1e-20
    assert tangent(end, schedule, 0.0) > 1e-2


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_after_the_rise_it_is_scms(schedule: str) -> None:
    """In units of the data's deviation, so sCM's constants are the deviation times rCM's."""
    (batch,) = batches(1, schedule=schedule)
    same = {"level_std": 1.6, "normalisation": 0.1 * STD}
    scm = built("scm", fading, schedule, level_mean=0.7 + math.log(0.5), **same)
    mine = built("rcm", fading, schedule, level_mean=0.7, normalisation=0.1)
    expected = scm.loss_at(batch, r=1.0)[0].detach()
    found = mine.consistency(batch, r=1.0)[0].detach()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_both_parts_stop_where_student_and_fake_score_are_exact(schedule: str) -> None:
    (batch,) = batches(1, schedule=schedule)
    found = []
    for student, fake in ((end, posterior), (end, end), (fading, posterior)):
        method = built("rcm", student, schedule)
        method.matching.model = Model(fake, method.schedule)
        method.loss_at(batch, count=2)[0].backward()
        found.append(float(method.model.distortion.grad.norm()))
    assert found[0] < 1e-5 * min(found[1:])


def test_samples_take_steps_at_random_levels_from_pure_noise() -> None:
    method, seen = built("rcm", fading), []
    (batch,) = batches(1, size=64)
    method.model.register_forward_hook(
        lambda model, args, output: seen.append((args[1], torch.is_grad_enabled()))
    )
    method.samples(batch, 3, "student")
    levels = torch.stack([t for t, _ in seen])
    assert [grad for _, grad in seen] == [False, False, True]
    assert bool((levels[0] == 1).all())
    assert bool((levels.diff(dim=0) < 0).all())
    assert float(levels[2].std()) > 0.1


def test_matching_begins_after_the_rise() -> None:
    method: Any = built("rcm", ramp_steps=20, student_every=5)

    def phases(step: int) -> list[tuple[str, str]]:
        return [(update.player, update.phase) for update in method.updates(step)]

    assert phases(0) == phases(19) == [("student", "consistency")]
    assert phases(20) == [("student", "1 steps"), ("fake_score", "1 steps")]
    assert phases(21) == [("fake_score", "2 steps")]
    assert phases(35) == [("student", "4 steps"), ("fake_score", "4 steps")]
    updates = sum(player == "student" for step in range(100) for player, _ in phases(step))
    assert updates == method.student_updates(method.config, 100) == 36
