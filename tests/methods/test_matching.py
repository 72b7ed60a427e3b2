"""The stage of distribution matching, with which a student of trajectories is finished."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.conditions import Condition
from harness.config import RunConfig, resolve
from harness.data.trajectories import open_store
from harness.errors import UsageError
from harness.methods import METHODS, Batch
from harness.methods.base import EMA
from harness.methods.matching import Matching, MatchingConfig
from harness.randomness import Keyed, keyed_initialisation
from harness.tasks import Task
from harness.trainer import Trainer, TrainSettings

CPU = torch.device("cpu")


def student(task: Task, total_steps: int = 40, **options: Any) -> Any:
    with keyed_initialisation(0, "student"):
        config = METHODS["ard"].Config(**{"history_layers": 2, "dmd_from": 0.5, **options})
        return METHODS["ard"](config, task.teacher(CPU), task, 2, total_steps)


@pytest.fixture
def batch(tiny: Task) -> Batch:
    index = torch.arange(8)
    store = open_store(tiny.recipe, tiny.teacher(CPU), CPU)
    return Batch(index, tiny.split.train.batch(index), store.batch(index), Keyed("train", 0, 0))


def gradients(method: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, list(method.players["student"].module.parameters()), allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def test_the_stage_has_its_phases(tiny: Task) -> None:
    method = student(tiny, dmd_from=0.5, dmd_every=4)

    def phases(step: int) -> list[tuple[str, str]]:
        return [(update.player, update.phase) for update in method.updates(step)]

    assert phases(0) == phases(19) == [("student", "")]
    assert phases(20) == phases(24) == phases(36) == [("student", "matching"), ("fake_score", "")]
    assert phases(21) == phases(23) == phases(39) == [("fake_score", "alone")]
    found = sum(player == "student" for step in range(40) for player, _ in phases(step))
    assert found == 25
    assert method.student_player.ema.decay == EMA(method.student_player.module, 0.05, found).decay


def test_the_loss_is_the_regressions_and_that_of_matching_the_last_state(tiny: Task, batch: Batch) -> None:
    method = student(tiny, dmd_weight=3.0)
    with torch.no_grad():
        for parameter in method.stage.matching.fake.parameters():
            parameter.mul_(0.9)
    loss, metrics = method.stage.student_loss(method.loss, batch)
    found = gradients(method, loss)
    own, _ = method.loss(batch)
    matching, _ = method.stage.matching.student_loss(batch.carry["x_0"], batch.trajectory.cond, batch)
    expected = gradients(method, own + 3 * matching)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert float(metrics["mse"]) == pytest.approx(float(own.detach()))
    assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(found, gradients(method, method.loss(batch)[0]), strict=True))


@pytest.mark.parametrize(("scale", "sign"), [(1.0, 0), (0.5, -1), (1.5, 1)])
def test_samples_move_from_the_fakes_denoiser_to_the_teachers(scale: float, sign: int, tiny: Task, batch: Batch) -> None:
    """With the fake's x_0 a multiple of the teacher's the gradient points from it to the teacher's, and vanishes where they are equal."""
    matching = Matching(MatchingConfig(student_gan=0, fake_gan=0), tiny.teacher(CPU), tiny, starts_as_teacher=True)
    teacher, cond = matching.teacher, Condition(batch.data[1].labels)

    def scaled(x_t: Any, t: Any, cond: Any) -> Any:
        found = teacher(x_t, t, cond)
        return type("Scaled", (), {"x_0": scale * found.x_0})

    matching.model = scaled  # type: ignore[assignment]
    x = batch.data[0].clone().requires_grad_(True)
    matching.student_loss(x, cond, batch)[0].backward()
    x_t, t = matching.noised(x.detach(), batch, "student")
    with torch.no_grad():
        towards = (x.grad * teacher(x_t, t, cond).x_0).flatten(1).sum(1)
    assert torch.equal(towards.sign(), torch.full_like(towards, sign))


def test_the_fake_score_learns_the_students_samples(tiny: Task, batch: Batch) -> None:
    sources = {"data": tiny.split.train, "trajectory": open_store(tiny.recipe, tiny.teacher(CPU), CPU)}
    training = Trainer(student(tiny, 60, dmd_from=0.0), sources, TrainSettings(60, 16, 0, log_every=1), None, CPU)
    training.train()
    losses = [point["fake_score/denoising"] for point in training.curve]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_a_stage_needs_a_network() -> None:
    with pytest.raises(UsageError, match="dmd_from needs a teacher that is a network"):
        resolve(RunConfig(method="ard", task="mixture", options={"dmd_from": 0.5}))


def test_a_student_is_finished_in_one_way(tiny_folder: Any) -> None:
    with pytest.raises(UsageError, match="gan_from and dmd_from are two ways"):
        resolve(RunConfig(method="ard", task="tiny", num_steps=2, options={"history_layers": 2, "dmd_from": 0.5, "gan_from": 0.5}))


def test_without_a_stage_its_options_name_the_same_run(tiny_folder: Any) -> None:
    ids = {resolve(RunConfig(method="ard", task="tiny", num_steps=2, options={"history_layers": 2, **more})).run_id
           for more in ({}, {"dmd_every": 2, "dmd_weight": 0.1})}  # fmt: skip
    assert len(ids) == 1
