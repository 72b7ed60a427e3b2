"""The stage of distribution matching, with which a student of trajectories is finished."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.data.trajectories import open_store
from harness.diffusion.conditions import Condition
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.errors import UsageError
from harness.methods import METHODS, Batch
from harness.methods.parts.matching import Matching, MatchingConfig
from harness.methods.parts.players import EMA
from harness.runs.config import RunConfig
from harness.runs.resolve import resolve
from harness.tasks import Task
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

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
    found = torch.autograd.grad(
        loss, list(method.players["student"].module.parameters()), allow_unused=True
    )
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


def test_the_loss_is_the_regressions_and_that_of_matching_the_last_state(
    tiny: Task, batch: Batch
) -> None:
    method = student(tiny, dmd_weight=3.0)
    with torch.no_grad():
        for parameter in method.stage.matching.fake.parameters():
            parameter.mul_(0.9)
    loss, metrics = method.stage.student_loss(method.loss, batch)
    found = gradients(method, loss)
    own, _ = method.loss(batch)
    matching, _ = method.stage.matching.student_loss(
        batch.carry["x_0"], batch.trajectory.cond, batch
    )
    expected = gradients(method, own + 3 * matching)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
    assert float(metrics["mse"]) == pytest.approx(float(own.detach()))
    assert any(
        not torch.allclose(a, b, rtol=1e-2)
        for a, b in zip(found, gradients(method, method.loss(batch)[0]), strict=True)
    )


@pytest.mark.parametrize(("scale", "sign"), [(1.0, 0), (0.5, -1), (1.5, 1)])
def test_samples_move_from_the_fakes_denoiser_to_the_teachers(
    scale: float, sign: int, tiny: Task, batch: Batch
) -> None:
    """Gradient descent moves samples from the fake's x_0 towards the teacher's.

    The fake's x_0 is a multiple of the teacher's; where both are equal the gradient vanishes.
    """
    matching = Matching(
        MatchingConfig(student_gan=0, fake_gan=0), tiny.teacher(CPU), tiny, starts_as_teacher=True
    )
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


@pytest.mark.parametrize("place", [0, 1])
def test_the_fake_score_is_shown_the_students_samples(
    place: int, tiny: Task, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake score trains on samples of the student.

    In a step that updates the student they are those of this update; otherwise they are fresh.
    """
    method, seen = student(tiny, dmd_every=2), []
    monkeypatch.setattr(
        method.stage.matching,
        "fake_loss",
        lambda x, cond, batch: seen.append((x, cond)) or (x.sum(), {}),
    )
    updates = list(method.updates(20 + place))
    for update in updates:
        update.loss(batch)
    method.loss(batch)
    ((x, cond),) = seen
    assert [update.player for update in updates] == (
        ["student", "fake_score"] if not place else ["fake_score"]
    )
    assert not x.requires_grad
    torch.testing.assert_close(x, batch.carry["x_0"].detach())
    assert torch.equal(cond.labels, batch.trajectory.cond.labels)
    assert not torch.allclose(x, batch.data[0], atol=0.1)


def test_the_fake_scores_error_is_that_of_its_networks_output(tiny: Task, batch: Batch) -> None:
    matching = Matching(
        MatchingConfig(student_gan=0, fake_gan=0), tiny.teacher(CPU), tiny, starts_as_teacher=True
    )
    x, cond = batch.data[0], batch.data[1]
    found, _ = matching.fake_loss(x, cond, batch)
    x_t, t = matching.noised(x, batch, "fake")
    eps = batch.normal("fake eps", x.shape[1:])
    expected = (matching.teacher.denoiser(x_t, t, cond).eps - eps).square().mean()
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-3, atol=0)


def test_the_fake_scores_rate_is_that_of_the_stage(tiny: Task) -> None:
    rate = student(tiny, dmd_from=0.8, warmup=0.1).stage.player.rate
    assert [rate(p) for p in (0.81, 0.82, 1.0)] == pytest.approx([0.5, 1.0, 0.0])


@pytest.mark.parametrize("every", [1, 2, 4, 5])
@pytest.mark.parametrize("counts", [[1, 2], [1, 2, 4]])
def test_every_number_of_steps_is_finished(counts: list[int], every: int, tiny: Task) -> None:
    options = {"step_counts": counts, "heads": "shared", "dmd_every": every}
    method = student(tiny, 240, **options)
    phases: dict[str, dict[str, int]] = {"before": {}, "in stage": {}}
    for step in range(240):
        for update in method.updates(step):
            if update.player == "student":
                when = phases["before" if step < 120 else "in stage"]
                when[update.phase] = when.get(update.phase, 0) + 1
    assert set(phases["before"]) == {f"{count} steps" for count in counts}
    assert set(phases["in stage"]) == {f"matching {count} steps" for count in counts}
    for found in phases.values():
        assert max(found.values()) - min(found.values()) <= 1


def test_the_fake_score_learns_the_students_samples(tiny: Task, batch: Batch) -> None:
    sources = {
        "data": tiny.split.train,
        "trajectory": open_store(tiny.recipe, tiny.teacher(CPU), CPU),
    }
    training = Trainer(
        student(tiny, 60, dmd_from=0.0), sources, TrainSettings(60, 16, 0, log_every=1), None, CPU
    )
    training.train()
    losses = [point["fake_score/denoising"] for point in training.curve]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


def test_a_stage_needs_a_network() -> None:
    with pytest.raises(UsageError, match="dmd_from needs a teacher that is a network"):
        resolve(RunConfig(method="ard", task="mixture", options={"dmd_from": 0.5}))


def test_a_student_is_finished_in_one_way(tiny_folder: Any) -> None:
    with pytest.raises(UsageError, match="gan_from and dmd_from are two ways"):
        resolve(
            RunConfig(
                method="ard",
                task="tiny",
                num_steps=2,
                options={"history_layers": 2, "dmd_from": 0.5, "gan_from": 0.5},
            )
        )


def test_without_a_stage_its_options_name_the_same_run(tiny_folder: Any) -> None:
    ids = {
        resolve(
            RunConfig(method="ard", task="tiny", num_steps=2, options={"history_layers": 2, **more})
        ).run_id
        for more in ({}, {"dmd_every": 2, "dmd_weight": 0.1})
    }
    assert len(ids) == 1
