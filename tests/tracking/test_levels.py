"""The gradient norm of a student's loss by noise level, which trackers are told."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from method_cases import CASES, case_of
from recorder import Recorder
from torch import Tensor

from harness.diffusion.randomness import Keyed
from harness.methods import METHODS, Batch, Method, Update
from harness.progress import NOBODY, Both, Follower, Subject
from harness.tasks import Task
from harness.tracking.tracked import Tracked
from harness.training import levels
from harness.training.case import BATCH, STEPS, Case, weights
from harness.training.flops import unchanged
from harness.training.levels import gradient_norms
from harness.training.purpose_checks import keys_drawn
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

SHORT = "ard with a GAN stage"
"""The case of every run: history, two players and a state that losses change."""
TRAINED = [name for name, (method, _) in CASES.items() if METHODS[method].sources]


def norms_of(trainer: Trainer, task: Task, step: int = 0) -> dict[str, float]:
    return gradient_norms(trainer.method, trainer.batches, task.schedule, step)


def part_of(t: float) -> str:
    """The name of the part of the timesteps that holds t."""
    part = min(int(8 * t + 1e-4), 7)
    return f"gradient_norm_{125 * part:03}_{125 * (part + 1):03}"


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == SHORT else [pytest.mark.slow]) for name in TRAINED],
)
def test_looking_changes_no_bit_of_training(
    name: str, tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a weight, nor an average, nor the curve, nor the bill."""
    monkeypatch.setattr(levels, "UPDATES", 2)
    case, found = case_of(name, tiny, tmp_path), list[dict[str, float]]()
    plain, looked = case.build(), case.build()
    without, trainer = case.trainer(plain), case.trainer(looked)
    without.train(6)
    trainer.train(6, look=lambda: found.append(norms_of(trainer, tiny, trainer.step)))
    expected, here = weights(plain), weights(looked)
    assert expected.keys() == here.keys()
    assert [key for key in here if not torch.equal(here[key], expected[key])] == []
    assert trainer.curve == without.curve
    for key in ("flops", "images", "updates", "teacher_evaluations"):
        assert getattr(trainer.bill, key) == getattr(without.bill, key)
    assert len(found) == 4  # before the first of 10 steps, after 2, 3 and 5
    assert all(norms and all(map(math.isfinite, norms.values())) for norms in found)


# what is measured


def with_loss(method: Method, seen: list[Tensor]) -> None:
    """Gives a method the loss `mean t sum(output)`, whose gradient in a sample's output is t."""
    network = method.players["student"].module

    def loss(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(batch.index)
        assert batch.data is not None
        t = batch.uniform("t").float()
        output = network(batch.data[0], 1000 * t.double() - 1, batch.data[1])
        return (t * output.flatten(1).sum(1)).mean(), {}

    method.updates = lambda step: [Update("student", loss)]  # type: ignore[method-assign]


@pytest.mark.parametrize("micro", [None, 4])
def test_the_norm_is_that_of_a_samples_own_loss(
    micro: int | None, tiny: Task, tmp_path: Path
) -> None:
    """It is t sqrt(64) here, on the timesteps of the run's first 128 samples, at every step."""
    case, seen = Case("denoising", tiny, tmp_path), list[Tensor]()
    method = case.build()
    with_loss(method, seen)
    trainer = case.trainer(method, seed=3, micro_batch_size=micro)
    t = Keyed("train", 3).uniform("t", torch.arange(128)).tolist()
    parts: dict[str, list[float]] = {}
    for one in t:
        parts.setdefault(part_of(one), []).append(8 * one)
    expected = {name: sum(some) / len(some) for name, some in parts.items()}
    assert len(expected) == 8
    for step in (0, 3, STEPS):
        assert norms_of(trainer, tiny, step) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(torch.cat(seen[: len(seen) // 3]), torch.arange(128))


def test_a_cycle_is_gone_through(tiny: Task, tmp_path: Path) -> None:
    """The student trains in steps 0, 5, 10, ... on one of its two levels each, in turn."""
    case = Case("dmd2", tiny, tmp_path, {"student_every": 5})
    method = case.build(total_steps=40)
    trainer = Trainer(method, case.sources, TrainSettings(40, BATCH, 0), None, case.device)
    expected = {part_of(level) for level in method.levels[:-1].tolist()}
    assert len(expected) == 2
    for step in (7, 40):
        assert norms_of(trainer, tiny, step).keys() == expected


def test_it_draws_numbers_of_the_first_training_step_alone(tiny: Task, tmp_path: Path) -> None:
    case = Case("ect", tiny, tmp_path)
    trainer = case.trainer(case.build(), seed=5)
    with keys_drawn() as keys:
        norms_of(trainer, tiny, 3)
    assert {tuple(key.split("\0")[:3]) for key in keys} == {
        ("train", "5", "0"),
        ("order", "5", "0"),
    }


# who looks


def test_nobody_looks_without_a_tracker() -> None:
    Both(Follower(), NOBODY).levels(0, lambda: pytest.fail("looked"))


def test_a_tracker_is_told_once_and_finite_numbers_alone(tmp_path: Path) -> None:
    told, calls = Recorder(), list[int]()
    follower = Both(NOBODY, Tracked("recorder", told, "", pytest.fail))
    follower.begin(Subject("a run", "code", tmp_path, tmp_path, {}))

    def measure() -> dict[str, float]:
        calls.append(1)
        return {"a": 1.0, "b": math.nan}

    for step in (0, 0, 2):
        follower.levels(step, measure)
    assert told.events[1:] == [("levels", 0, {"a": 1.0}), ("levels", 2, {"a": 1.0})]
    assert len(calls) == 2


def test_a_look_that_fails_stops_the_tracker_alone(tmp_path: Path) -> None:
    told, said = Recorder(), list[str]()
    follower = Tracked("recorder", told, "", said.append)
    follower.begin(Subject("a run", "code", tmp_path, tmp_path, {}))

    def fails() -> dict[str, float]:
        raise MemoryError("no room")

    follower.levels(0, fails)
    follower.levels(2, fails)
    assert said == ["--track recorder stops, the run goes on: MemoryError: no room"]


def test_a_look_that_fails_leaves_the_methods_state_as_it_was(tiny: Task, tmp_path: Path) -> None:
    method = case_of("ard with a GAN stage", tiny, tmp_path).build()

    def fails() -> None:
        with unchanged(method):
            method.load_state_dict({**method.state_dict(), "gan_weight": 7.0})
            raise MemoryError

    with pytest.raises(MemoryError):
        fails()
    assert method.state_dict()["gan_weight"] == 0.0
