"""Teacher training: the loss by hand, label dropout, and a problem that is learnt."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.data.images import ImageSet
from harness.diffusion.conditions import Condition
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.diffusion.schedules import FlowSchedule
from harness.methods import Batch
from harness.methods.denoising import Denoising
from harness.tasks import Task
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

CPU = torch.device("cpu")


def build(task: Task, total_steps: int = 10, **options: Any) -> Denoising:
    with keyed_initialisation(0, "denoising"):
        method = Denoising(Denoising.Config(**options), None, task, 4, total_steps)
        for parameter in method.players["student"].module.parameters():  # a fresh DiT outputs zeros
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return method


def batch_of(task: Task, count: int) -> Batch:
    index = torch.arange(count)
    items = index % len(task.split.train)
    return Batch(index, task.split.train.batch(items), None, Keyed("train", 3, 7))


def test_the_loss_equals_a_hand_computation(tiny: Task) -> None:
    method, batch = build(tiny, label_dropout=0.3), batch_of(tiny, 50)
    keys = Keyed("train", 3, 7)
    level = (keys.uniform("t", batch.index) * 1000).long()
    assert int(level.min()) < 100 < 900 < int(level.max())
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[level].reshape(-1, 1, 1, 1)
    eps = keys.normal("eps", batch.index, tiny.shape)
    x_0, cond = batch.data
    noisy = (kept.sqrt() * x_0 + (1 - kept).sqrt() * eps).float()
    cond = Condition(torch.where(keys.uniform("dropout", batch.index) < 0.3, 10, cond.labels))
    with torch.no_grad():
        expected = (method.players["student"].module(noisy, level.float(), cond) - eps).square().mean()
        loss, metrics = method.loss(batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    assert float(metrics["mse"]) == float(loss)
    assert abs(float(expected) - 1) > 1e-3  # the network says something


def test_flow_matching_on_a_flow(tiny: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that predicts v on a flow learns eps - x_0, and is told t itself."""
    monkeypatch.setattr(tiny, "schedule", FlowSchedule())
    monkeypatch.setattr(tiny, "prediction_type", "v")
    method, batch = build(tiny, label_dropout=0.0), batch_of(tiny, 50)
    keys = Keyed("train", 3, 7)
    t = ((keys.uniform("t", batch.index) * 1000).long() + 1) / 1000
    eps, (x_0, cond) = keys.normal("eps", batch.index, tiny.shape), batch.data
    x_t = (1 - t).float().reshape(-1, 1, 1, 1) * x_0 + t.float().reshape(-1, 1, 1, 1) * eps
    with torch.no_grad():
        expected = (method.players["student"].module(x_t, t.float(), cond) - (eps - x_0)).square().mean()
        assert float(method.loss(batch)[0]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_the_share_of_dropped_labels(share: float, tiny: Task) -> None:
    method, batch = build(tiny, label_dropout=share), batch_of(tiny, 2000)
    seen: list[torch.Tensor] = []
    method.players["student"].module.register_forward_pre_hook(lambda module, args: seen.append(args[2].classes))
    with torch.no_grad():
        method.loss(batch)
    dropped = seen[0] == 10
    assert float(dropped.double().mean()) == pytest.approx(share, abs=3 * (share * (1 - share) / 2000) ** 0.5)
    assert torch.equal(seen[0][~dropped], batch.data[1].labels[~dropped])


def test_levels_are_uniform_over_dits(tiny: Task) -> None:
    method, batch = build(tiny), batch_of(tiny, 2000)
    seen: list[torch.Tensor] = []
    method.players["student"].module.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with torch.no_grad():
        method.loss(batch)
    times = seen[0].double()
    torch.testing.assert_close(times, times.round(), rtol=0, atol=1e-3)
    assert float(times.min()) >= -1e-3
    assert float(times.max()) <= 999 + 1e-3
    assert float(times.mean()) == pytest.approx(499.5, abs=4 * 1000 / (12 * 2000) ** 0.5)


def test_it_learns_a_fixed_problem(tiny: Task) -> None:
    train = tiny.split.train
    few = ImageSet(train.images[:4], train.labels[:4])
    method = build(tiny, 150, lr=0.01)
    index = torch.arange(64)
    fixed = Batch(index, few.batch(index % 4), None, Keyed("train", 9, 0))

    def error() -> float:
        with torch.no_grad():
            return float(method.loss(fixed)[0])

    before = error()
    Trainer(method, {"data": few}, TrainSettings(150, 32, 0), None, CPU).train()
    assert before > 0.9
    assert error() < 0.6 * before


def test_what_is_evaluated_is_the_average_seen_as_a_denoiser(tiny: Task) -> None:
    method = build(tiny)
    assert method.student.network is method.players["student"].ema.module
    x, t = torch.zeros(2, *tiny.shape), torch.tensor(0.5)
    prediction = method.student(x, t, Condition(torch.tensor([0, 1])))
    assert prediction.eps.shape == (2, *tiny.shape)
    assert len(method.levels) == 5
