"""The GAN stage: its gradients, its weight, its phases."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.data.trajectories import open_store
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.errors import UsageError
from harness.methods import METHODS, Batch
from harness.methods.parts.adversarial import LayerCall, recorded_call
from harness.networks.discriminator import Heads, SpectralConv1d, VirtualBatchNorm
from harness.runs.config import RunConfig
from harness.runs.resolve import resolve
from harness.tasks import Task
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

CPU = torch.device("cpu")
STEPS = 40


def student(task: Task, total_steps: int = STEPS, **options: Any) -> Any:
    with keyed_initialisation(0, "student"):
        config = METHODS["ard"].Config(**{"history_layers": 2, "gan_from": 0.5, **options})
        method = METHODS["ard"](config, task.teacher(CPU), task, 2, total_steps)
    for parameter in method.stage.heads.parameters():
        parameter.requires_grad_(False)
    return method


@pytest.fixture
def batch(tiny: Task) -> Batch:
    index = torch.arange(8)
    store = open_store(tiny.recipe, tiny.teacher(CPU), CPU)
    return Batch(index, tiny.split.train.batch(index), store.batch(index), Keyed("train", 0, 0))


def plain_losses(method: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """MSE and GAN as one graph, without the detour over the last layer's output."""
    mse, _ = method.loss(batch)
    return mse, -method.stage.logits(
        batch.carry["x_0"], batch.trajectory.cond, batch, "student"
    ).mean()


@pytest.mark.parametrize("heads", ["shared", "per_step"])
def test_the_gradient_is_that_of_mse_plus_lambda_gan(heads: str, tiny: Task, batch: Batch) -> None:
    method = student(tiny, heads=heads)
    method.stage.weight = 1e3  # so that the GAN's part weighs as much as the other one
    parameters = dict(method.players["student"].module.named_parameters())
    mse, gan = plain_losses(method, batch)
    expected = torch.autograd.grad(mse + 1e3 * gan, list(parameters.values()), allow_unused=True)
    loss, metrics = method.stage.student_loss(method.loss, batch)
    loss.backward()
    torch.testing.assert_close(loss, mse + 1e3 * gan, rtol=1e-4, atol=1e-4)
    assert metrics["gan_weight"] == pytest.approx(1e3)
    for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
        if gradient is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            torch.testing.assert_close(
                parameter.grad,
                gradient,
                rtol=1e-3,
                atol=1e-4 * float(gradient.abs().max()),
                msg=name,
            )
    of_mse = torch.autograd.grad(
        plain_losses(method, batch)[0], list(parameters.values()), allow_unused=True
    )
    changed = [
        not torch.allclose(a, b, rtol=1e-2)
        for a, b in zip(of_mse, expected, strict=True)
        if a is not None and b is not None
    ]
    assert sum(changed) > len(changed) / 2


@pytest.mark.parametrize("heads", ["shared", "per_step"])
def test_lambda_is_the_ratio_of_the_last_layers_gradients(
    heads: str, tiny: Task, batch: Batch
) -> None:
    method = student(tiny, heads=heads, gan_weight=10.0, gan_lag=0)
    weight = method.stage.last_layer.weight
    with torch.no_grad():  # so that the ratio stays below its clamp
        for head in method.stage.heads:
            head.project.bias.fill_(1.0)
    mse, gan = plain_losses(method, batch)
    of_mse, of_gan = (
        torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (mse, gan)
    )
    _, metrics = method.stage.student_loss(method.loss, batch)
    assert float(metrics["gan_weight"]) == pytest.approx(
        10 * min(float(of_mse / (of_gan + 1e-4)), 1e4), rel=1e-3
    )


def test_with_a_lag_lambda_is_that_of_the_step_before(tiny: Task, batch: Batch) -> None:
    now, before = student(tiny, gan_lag=0), student(tiny, gan_lag=1)
    _, metrics = now.stage.student_loss(now.loss, batch)
    _, first = before.stage.student_loss(before.loss, batch)
    assert float(first["gan_weight"]) == 0
    before.end_step(STEPS - 1, {})
    _, second = before.stage.student_loss(before.loss, batch)
    assert float(second["gan_weight"]) == pytest.approx(float(metrics["gan_weight"]), rel=1e-3)


def test_lambda_is_clamped(tiny: Task) -> None:
    adversary = student(tiny, gan_weight=2.0).stage
    gradients = torch.zeros_like(adversary.gradients)
    gradients[0] = 1e6
    assert adversary.balance(gradients) == 2e4
    assert adversary.balance(torch.zeros_like(gradients)) == 0


def test_a_watched_layers_weight_gradient() -> None:
    layer, x = nn.Linear(3, 5), torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    with recorded_call(layer) as seen:
        loss = layer(x).pow(3).sum()
    assert isinstance(seen, LayerCall)
    found = seen.weight_gradient(torch.autograd.grad(loss, seen.output, retain_graph=True)[0])
    torch.testing.assert_close(
        found, torch.autograd.grad(loss, layer.weight)[0], rtol=1e-4, atol=1e-3
    )


def test_the_stage_has_its_phases(tiny: Task) -> None:
    method = student(tiny, gan_from=0.5, gan_warmup_steps=5)

    def phases(step: int) -> list[tuple[str, str]]:
        return [(update.player, update.phase) for update in method.updates(step)]

    assert phases(0) == phases(19) == [("student", "")]
    assert phases(20) == phases(24) == [("student", ""), ("discriminator", "")]
    assert phases(25) == phases(39) == [("student", "gan"), ("discriminator", "")]


def test_the_students_schedule_ends_where_the_stage_begins(tiny: Task) -> None:
    """Up to there it is that of a run of its own, then a constant; the heads' is one throughout."""
    alone = METHODS["ard"].Config(history_layers=2, lr=1e-3).player(nn.Linear(1, 1), 20)
    stage = student(tiny, gan_from=0.5, lr=1e-3, gan_student_lr=2e-4)
    rate = stage.players["student"].rate
    for step in range(1, 21):
        assert rate(step / STEPS) == pytest.approx(alone.rate(step / 20), abs=1e-12)
    assert rate(20 / STEPS) == pytest.approx(0, abs=1e-12)
    assert [rate(step / STEPS) for step in range(21, 41)] == [pytest.approx(0.2)] * 20
    heads = stage.players["discriminator"]
    assert {heads.rate(step / STEPS) for step in range(1, 41)} == {1.0}
    assert heads.clip is None


def test_up_to_the_stage_the_run_is_the_regression_alone(tiny: Task) -> None:
    sources = {
        "data": tiny.split.train,
        "trajectory": open_store(tiny.recipe, tiny.teacher(CPU), CPU),
    }
    trained = []
    for total, options in ((4, {"gan_from": None}), (8, {"gan_from": 0.5, "gan_warmup_steps": 1})):
        with keyed_initialisation(0, "student"):
            config = METHODS["ard"].Config(history_layers=2, **options)
            method = METHODS["ard"](config, tiny.teacher(CPU), tiny, 2, total)
        training = Trainer(method, sources, TrainSettings(total, 8, 0), None, CPU)
        training.train(until=4)
        trained.append(method)
    alone, staged = (method.student_player for method in trained)
    for one, other in (
        (alone.module.state_dict(), staged.module.state_dict()),
        (alone.optimizer_state(), staged.optimizer_state()),
    ):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    training.train()
    after = staged.optimizer_state()
    assert {float(v) for name, v in after.items() if name.startswith("step ")} == {8.0}
    weights = alone.module.state_dict()
    assert not all(torch.equal(weights[n], v) for n, v in staged.module.state_dict().items())


def test_hinge(tiny: Task, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    method = student(tiny)
    method.loss(batch)
    answers = {"real": torch.full((3, 8, 4), 0.25), "student": torch.full((3, 8, 4), -3.0)}
    monkeypatch.setattr(method.stage, "logits", lambda x_0, cond, batch, name: answers[name])
    assert float(method.stage.discriminator_loss(batch)[0]) == pytest.approx(0.75)
    answers["student"] = torch.full((3, 8, 4), 0.5)
    assert float(method.stage.discriminator_loss(batch)[0]) == pytest.approx(0.75 + 1.5)


def test_the_heads_learn_to_tell_real_images_from_the_students(tiny: Task) -> None:
    sources = {
        "data": tiny.split.train,
        "trajectory": open_store(tiny.recipe, tiny.teacher(CPU), CPU),
    }
    method = student(tiny, 120, gan_from=0.0, gan_warmup_steps=119, gan_lr=3e-2)
    training = Trainer(method, sources, TrainSettings(120, 16, 0, log_every=1), None, CPU)
    training.train(until=100)
    losses = [point["discriminator/loss"] for point in training.curve]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_the_bill_counts_each_phase(tiny: Task) -> None:
    sources = {
        "data": tiny.split.train,
        "trajectory": open_store(tiny.recipe, tiny.teacher(CPU), CPU),
    }
    training = Trainer(
        student(tiny, 8, gan_warmup_steps=2),
        sources,
        TrainSettings(8, 8, 0),
        None,
        CPU,
        tiny.teacher(CPU),
    )
    flops = [0.0]
    for step in range(1, 9):
        training.train(until=step)
        flops.append(training.bill.flops)
    spent = [b - a for a, b in pairwise(flops)]
    assert spent[0] == spent[3] < spent[4] == spent[5] < spent[6] == spent[7]


def test_the_bill_counts_the_discriminators_teacher(tiny: Task) -> None:
    """A sample passes the teacher's blocks twice for the heads and once for the student."""
    sources = {
        "data": tiny.split.train,
        "trajectory": open_store(tiny.recipe, tiny.teacher(CPU), CPU),
    }
    with keyed_initialisation(0, "student"):
        teacher = tiny.teacher(CPU)
        config = METHODS["ard"].Config(history_layers=2, gan_from=0.5, gan_warmup_steps=2)
        method = METHODS["ard"](config, teacher, tiny, 2, 8)
    training = Trainer(method, sources, TrainSettings(8, 8, 0), None, CPU, teacher.denoiser.network)
    passes = []
    for step in range(1, 9):
        training.train(until=step)
        passes.append(training.bill.teacher_evaluations)
    assert passes == [0, 0, 0, 0, 16, 32, 32 + 24, 32 + 48]


def test_the_weight_of_the_same_batch_needs_all_of_it(tiny_folder: Any) -> None:
    options = {"history_layers": 2, "gan_from": 0.5, "gan_lag": 0}
    resolve(RunConfig(method="ard", task="tiny", num_steps=2, options=options))
    with pytest.raises(UsageError, match="need the whole batch at once"):
        resolve(
            RunConfig(
                method="ard",
                task="tiny",
                num_steps=2,
                options=options,
                batch_size=16,
                micro_batch_size=8,
            )
        )


def test_flops_are_counted_on_whole_virtual_batches(tiny: Task) -> None:
    sources = {
        "data": tiny.split.train,
        "trajectory": open_store(tiny.recipe, tiny.teacher(CPU), CPU),
    }
    method = student(tiny, 4, gan_from=0.0, gan_warmup_steps=1, gan_virtual_batch=6)
    training = Trainer(method, sources, TrainSettings(4, 12, 0, sample_group=6), None, CPU)
    training.train()
    assert training.step == 4


def test_without_a_stage_its_options_name_the_same_run(tiny_folder: Any) -> None:
    ids = {
        resolve(
            RunConfig(method="ard", task="tiny", num_steps=2, options={"history_layers": 2, **more})
        ).run_id
        for more in ({}, {"gan_lr": 0.5}, {"gan_max_time": 0.5, "gan_lag": 0})
    }
    assert len(ids) == 1
    with_gan = RunConfig(
        method="ard", task="tiny", num_steps=2, options={"history_layers": 2, "gan_from": 0.5}
    )
    assert resolve(with_gan).run_id not in ids


@pytest.mark.parametrize(
    ("sizes", "culprit"),
    [({"batch_size": 12}, "batch_size is 12"), ({"micro_batch_size": 4}, "micro_batch_size is 4")],
)
def test_batches_hold_whole_virtual_batches(
    sizes: dict[str, int], culprit: str, tiny_folder: Any
) -> None:
    config = RunConfig(
        method="ard",
        task="tiny",
        num_steps=2,
        options={"history_layers": 2, "gan_from": 0.5},
        **sizes,
    )
    with pytest.raises(UsageError, match=culprit):
        resolve(config)


def test_the_spectral_norm_becomes_one() -> None:
    with keyed_initialisation(0, "conv"):
        conv = SpectralConv1d(6, 5, 3)
    for _ in range(300):
        conv.power_iteration()
    norm = (conv.left @ conv.weight.flatten(1) @ conv.right).detach()
    assert float(norm) == pytest.approx(
        float(torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2)), rel=1e-4
    )
    x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    around = nn.functional.pad(x, (1, 1), mode="circular")
    torch.testing.assert_close(
        conv(x),
        nn.functional.conv1d(around, conv.weight / norm, conv.bias),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_a_head_goes_around_its_tokens(tokens: int) -> None:
    """Turning the tokens turns the logits, whatever the number of tokens beside the kernel's 9."""
    with keyed_initialisation(0, "head"):
        head = Heads(1, 8, 4)[0]
    x = torch.randn(4, tokens, 8, generator=torch.Generator().manual_seed(0))
    c = torch.ones(4, 8)
    turned = head(x.roll(2, 1), c)
    torch.testing.assert_close(turned, head(x, c).roll(2, 1), rtol=1e-4, atol=1e-5)


def test_a_loss_does_not_move_the_heads_buffers(tiny: Task, batch: Batch) -> None:
    method = student(tiny)
    before = {name: value.clone() for name, value in method.stage.heads.state_dict().items()}
    method.stage.student_loss(method.loss, batch)
    method.stage.discriminator_loss(batch)
    assert all(
        torch.equal(value, before[name]) for name, value in method.stage.heads.state_dict().items()
    )
    with torch.no_grad():
        for parameter in method.stage.heads.parameters():
            parameter.add_(torch.linspace(0, 1, parameter.numel()).view_as(parameter))
    method.end_step(STEPS - 1, {})
    moved = method.stage.heads.state_dict()
    assert not torch.equal(moved["0.wide.0.left"], before["0.wide.0.left"])


def test_virtual_batches_are_normalised_apart() -> None:
    norm = VirtualBatchNorm(3, 4)
    x = torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.cat(
        [nn.functional.batch_norm(part, None, None, training=True) for part in x.split(4)]
    )
    torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        norm(x[:2]),
        nn.functional.batch_norm(x[:2], None, None, training=True),
        rtol=1e-4,
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="6 samples"):
        norm(x[:6])


def test_one_head_a_block() -> None:
    heads = Heads(3, 8, 4)
    assert len(heads) == 3
    logits = heads[0](torch.ones(4, 5, 8), torch.ones(4, 8))
    assert logits.shape == (4, 5)


def test_ladds_student_asks_for_what_looks_real_and_its_critic_tells_apart(
    tiny: Task, batch: Batch
) -> None:
    """With logits that are the mean of an image times a slope."""
    cls = METHODS["ladd"]
    method: Any = cls(cls.Config(gan_virtual_batch=2), tiny.teacher(CPU), tiny, 1, 10)
    slope, shown = torch.tensor(1e-3, requires_grad=True), []  # small: no hinge is past its corner

    def logits(x_0: Tensor, cond: Any, batch: Batch, name: str) -> Tensor:
        shown.append(x_0)
        return slope * x_0.mean((1, 2, 3))

    method.critic.logits = logits
    loss, _ = method.loss(batch)
    (gradient,) = torch.autograd.grad(loss, shown[0], retain_graph=True)
    assert bool((gradient < 0).all())  # up, where the logit is higher
    batch.carry["x_0"] = batch.trajectory.states[:, -1] - 0.3  # samples below the real images
    (of_slope,) = torch.autograd.grad(method.discriminator_loss(batch)[0], slope)
    assert float(of_slope) < 0  # a steeper logit tells more
    assert torch.equal(shown[-2], batch.trajectory.states[:, -1])
