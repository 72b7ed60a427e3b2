"""The trainer on networks so small that every number is known."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import needs_compiler, run_graphs_eagerly
from torch import Tensor, nn

from harness.data.arrays import Arrays
from harness.data.images import ImageSet
from harness.diffusion.randomness import keyed_initialisation
from harness.errors import Interrupted, RunFailed, UsageError
from harness.methods import Batch, Method, Player, Update
from harness.methods.parts.players import EMA, constant, cosine
from harness.progress import Progress
from harness.training.batches import Batches, Items
from harness.training.settings import TrainSettings
from harness.training.trainer import STEERING, Trainer

CPU = torch.device("cpu")
STEPS = 12


def images(count: int = 20) -> ImageSet:
    with keyed_initialisation(0, "images"):
        return ImageSet(torch.randn(count, 1, 2, 2), torch.arange(count) % 3)


class Toy(Method):
    """One linear layer that is to denoise 2 x 2 images."""

    sources = frozenset({"data"})

    def __init__(
        self,
        total_steps: int = STEPS,
        lr: float = 0.1,
        clip: float | None = None,
        spoil: Callable[[int], float] | None = None,
    ):
        with keyed_initialisation(0, "toy"):
            layer = nn.Linear(4, 4)
        self.players = {
            "layer": Player(
                layer,
                torch.optim.AdamW(layer.parameters(), lr),
                clip,
                EMA(layer, 0.1, total_steps),
                cosine(0.05),
            )
        }
        self.spoil, self.seen = spoil or (lambda step: 1.0), list[int]()

    def updates(self, step: int) -> Iterable[Update]:
        return [Update("layer", lambda batch: self.loss(batch, self.spoil(step)))]

    def loss(self, batch: Batch, factor: float) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append(len(batch.index))
        x = batch.data[0].flatten(1)
        loss = (self.players["layer"].module(x + batch.normal("eps", (4,))) - x).square().mean()
        return loss * factor, {"plain": loss.detach()}


def trainer(
    method: Method, folder: Path | None = None, teacher: nn.Module | None = None, **settings: Any
) -> Trainer:
    given = {"total_steps": STEPS, "batch_size": 4, "seed": 0, "log_every": 1, **settings}
    return Trainer(method, {"data": images()}, TrainSettings(**given), folder, CPU, teacher)


def state(method: Method) -> list[Tensor]:
    player = method.players["layer"]
    modules = [player.module, player.ema.module] if player.ema else [player.module]
    return [value.clone() for module in modules for value in module.state_dict().values()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# failures


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e38])
def test_a_loss_or_gradient_that_is_not_finite_fails_the_run(factor: float, precision: str) -> None:
    method = Toy(spoil=lambda step: factor if step == 3 else 1.0)
    training = trainer(method, precision=precision)
    training.train(until=3)
    before = state(method)
    with pytest.raises(RunFailed, match=r"layer: loss .* at step 3: not finite"):
        training.train()
    assert same(before, state(method))


def test_an_overflow_inside_a_bf16_layer_fails_the_run() -> None:
    """bf16 reaches as far as float32, so only what overflows both is not finite."""
    method = Toy()
    training = trainer(method, precision="bf16")
    with torch.no_grad():
        method.players["layer"].module.weight.fill_(3e38)
    with pytest.raises(RunFailed, match=r"layer: loss (nan|inf), .* at step 0: not finite"):
        training.train()


def test_curves_hold_finite_numbers_alone(tmp_path: Path) -> None:
    training = trainer(Toy(), tmp_path)
    training.train(until=1)
    training.note_quality({"fid": 2.0, "kl": math.inf, "kid": math.nan})
    training.write_curves()
    lines = (tmp_path / "curves.jsonl").read_text().splitlines()
    assert {"step": 1, "fid": 2.0} in map(json.loads, lines)


@pytest.mark.parametrize(
    "content", [b"", b"no checkpoint", "cut", {"step": 1}, "other method"], ids=str
)
def test_a_corrupt_checkpoint_is_told_in_one_sentence(content: Any, tmp_path: Path) -> None:
    trainer(Toy(), tmp_path).train(until=2)
    path = tmp_path / "checkpoint" / "state.pt"
    whole = path.read_bytes()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif content == "other method":
        saved = torch.load(path, weights_only=True)
        saved["players"] = {"somebody": saved["players"]["layer"]}
        torch.save(saved, path)
    else:
        torch.save(content, path)
    with pytest.raises(
        UsageError, match=r"checkpoint .* cannot be read .* delete its folder to start anew"
    ) as caught:
        trainer(Toy(), tmp_path).train()
    assert "\n" not in str(caught.value)


def test_settings_that_do_not_suit() -> None:
    with pytest.raises(
        UsageError, match="micro_batch_size is 3, but must divide batch_size, which is 4"
    ):
        trainer(Toy(), micro_batch_size=3)
    with pytest.raises(ValueError, match=r"needs the sources \['data'\]"):
        Trainer(Toy(), {}, TrainSettings(STEPS, 4, 0), None, CPU)


# compiling


@needs_compiler
def test_a_compiled_network_learns_the_same_and_costs_the_same(tmp_path: Path) -> None:
    eager, whole, halves = Toy(), Toy(), Toy()
    plain, straight = trainer(eager), trainer(whole, compile=True)
    plain.train()
    torch._dynamo.utils.counters.clear()
    straight.train()
    assert graphs() > 0
    assert straight.bill.flops == plain.bill.flops > 0
    for compiled, known in zip(state(whole), state(eager), strict=True):
        torch.testing.assert_close(compiled, known)
    trainer(halves, tmp_path, compile=True).train(until=5)
    resumed = Toy()
    trainer(resumed, tmp_path, compile=True).train()
    assert same(state(whole), state(resumed))


def graphs() -> int:
    """How many were compiled since the last reset."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"micro_batch_size": 2}], ids=str)
def test_all_is_compiled_before_the_clock_runs(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_graphs_eagerly(monkeypatch)
    first = trainer(Toy(), tmp_path, compile=True, **settings)
    first.train(until=3)
    resumed = trainer(Toy(), tmp_path, compile=True, **settings)
    resumed._resume()
    torch._dynamo.utils.counters.clear()
    assert resumed._prepare() > 0
    assert (prepared := graphs()) > 0
    resumed.one_step()
    assert graphs() == prepared


def test_many_networks_are_compiled_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    run_graphs_eagerly(monkeypatch)
    for _ in range(10):
        method = Toy()
        training = trainer(method, compile=True)
        torch._dynamo.utils.counters.clear()
        training.train(until=1)
        assert graphs() > 0


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(
        UsageError,
        match="compile needs a C\\+\\+ compiler, but there is no 'no-such-compiler' here",
    ):
        trainer(Toy(), compile=True)
    trainer(Toy())


# signals


def signals(*numbers: signal.Signals) -> Progress:
    """A callback of progress that sends them at step 5."""
    return lambda done, total: (
        [os.kill(os.getpid(), number) for number in numbers] and None if done == 5 else None
    )


def test_a_checkpoint_that_cannot_be_written_when_a_signal_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops all the same, and says that the state is lost; without a signal it is an error."""

    def full(path: Path, write: Callable) -> None:
        raise UsageError("no space")

    monkeypatch.setattr("harness.training.checkpoints.write_aside", full)
    with pytest.raises(Interrupted, match="at step 5, not saved: no space"):
        trainer(Toy(), tmp_path).train(progress=signals(signal.SIGTERM))
    with pytest.raises(UsageError, match="no space"):
        trainer(Toy(), tmp_path).train()


def test_who_insists_does_not_wait_for_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(Toy(), tmp_path).train(progress=signals(signal.SIGINT, signal.SIGINT))
    assert list(tmp_path.rglob("*.pt")) == []
    with pytest.raises(Interrupted):  # as a starter's workers get them
        trainer(Toy(), tmp_path).train(progress=signals(signal.SIGINT, signal.SIGTERM))
    assert len(list(tmp_path.rglob("*.pt"))) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_a_checkpoint_and_the_run_resumes(
    number: signal.Signals, tmp_path: Path
) -> None:
    whole = Toy()
    straight = trainer(whole, tmp_path / "whole")
    straight.train()

    def interrupt(done: int, total: int) -> None:
        if done == 5:
            os.kill(os.getpid(), number)

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match=f"stopped by signal {int(number)} at step 5"):
        trainer(Toy(), tmp_path / "halves").train(progress=interrupt)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert (
        torch.load(tmp_path / "halves" / "checkpoint" / "state.pt", weights_only=True)["step"] == 5
    )
    resumed = Toy()
    second = trainer(resumed, tmp_path / "halves")
    second.train()
    assert len(resumed.seen) == STEPS - 5
    assert second.step == STEPS
    assert same(state(whole), state(resumed))
    assert second.curve == straight.curve
    assert all(
        getattr(second.bill, name) == getattr(straight.bill, name)
        for name in ("images", "flops", "updates")
    )


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    trainer(Toy(), tmp_path).train()
    again = Toy()
    trainer(again, tmp_path).train()
    assert not again.seen


def test_checkpoints_are_written_while_it_runs(tmp_path: Path) -> None:
    steps: list[int] = []

    def look(done: int, total: int) -> None:
        path = tmp_path / "checkpoint" / "state.pt"
        if path.exists():
            steps.append(torch.load(path, weights_only=True)["step"])

    trainer(Toy(), tmp_path, checkpoint_seconds=0.0).train(progress=look)
    assert steps == list(range(1, STEPS))
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "curves.jsonl",
        "state.pt",
    ]


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer(Toy()).train()
    assert not list(tmp_path.iterdir())


# learning rate, clipping, averages


def test_the_learning_rate_rises_and_falls_along_a_cosine() -> None:
    factors = [cosine(0.2)(progress) for progress in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)]
    falling = [0.5 * (1 + math.cos(math.pi * x)) for x in (0, 0.25, 0.5, 0.75, 1)]
    assert factors == pytest.approx([0.25, 0.5, *falling])
    assert factors[-1] == pytest.approx(0, abs=1e-12)


def test_the_learning_rate_may_stay_constant() -> None:
    assert [constant(p) for p in (0.1, 0.2, 0.5, 1.0)] == [1, 1, 1, 1]
    assert cosine(0.0)(0.5) == pytest.approx(0.5)


def test_the_optimizer_gets_the_rate_of_its_step() -> None:
    method = Toy(lr=0.1)
    training = trainer(method)
    found = []
    for step in range(STEPS):
        training.train(until=step + 1)
        found.append(method.players["layer"].optimizer.param_groups[0]["lr"])
    expected = [0.1 * method.players["layer"].rate((step + 1) / STEPS) for step in range(STEPS)]
    assert found == pytest.approx(expected)
    assert found[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("clip", [0.01, None])
def test_gradients_are_clipped_to_a_norm(clip: float | None) -> None:
    method = Toy(clip=clip, spoil=lambda step: 100.0)
    layer = method.players["layer"]
    layer.optimizer, layer.rate = torch.optim.SGD(layer.module.parameters(), 1.0), constant
    before = nn.utils.parameters_to_vector(layer.module.parameters()).detach().clone()
    trainer(method).train(until=1)
    moved = float(
        (nn.utils.parameters_to_vector(layer.module.parameters()) - before).norm().detach()
    )
    assert moved == pytest.approx(0.01, rel=1e-3) if clip else moved > 1


def test_the_average_follows_its_formula() -> None:
    module = nn.BatchNorm1d(2)
    ema = EMA(module, half_life=0.5, total_steps=8)
    assert ema.decay == pytest.approx(0.5 ** (1 / 4))
    expected = module.weight.detach().clone()
    for step in range(8):
        module.weight.data += step + 1
        module.running_mean += 1
        ema.update(module)
        expected = ema.decay * expected + (1 - ema.decay) * module.weight.detach()
    torch.testing.assert_close(ema.module.weight, expected)
    assert torch.equal(ema.module.running_mean, module.running_mean)
    assert not ema.module.training
    assert not ema.module.weight.requires_grad


def test_the_weight_of_the_initial_parameters() -> None:
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(1.0)
    ema = EMA(module, half_life=0.25, total_steps=40)
    module.weight.data.fill_(0.0)
    for _ in range(40):
        ema.update(module)
    assert ema.initial_weight == pytest.approx(0.5**4)
    assert float(ema.module.weight) == pytest.approx(ema.initial_weight, rel=1e-5)


def test_the_average_is_moved_after_each_step() -> None:
    method = Toy()
    layer = method.players["layer"]
    expected = layer.module.weight.detach().clone()
    training = trainer(method)
    for step in range(3):
        training.train(until=step + 1)
        expected = torch.lerp(expected, layer.module.weight.detach(), 1 - layer.ema.decay)
    torch.testing.assert_close(layer.ema.module.weight, expected)


# batches


def test_each_epoch_is_a_new_permutation() -> None:
    items = Items("data", 10, seed=0)
    epochs = [items(torch.arange(10 * e, 10 * e + 10)).tolist() for e in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert items(torch.arange(10)).tolist() == epochs[0]
    assert Items("data", 10, seed=1)(torch.arange(10)).tolist() != epochs[0]
    assert Items("trajectory", 10, seed=0)(torch.arange(10)).tolist() != epochs[0]


def test_items_of_a_batch_across_many_epochs() -> None:
    whole = Items("data", 3, 0)(torch.arange(12))
    parts = torch.cat([Items("data", 3, 0)(part) for part in torch.arange(12).split(2)])
    assert torch.equal(whole, parts)


def test_micro_batches_are_the_steps_samples_in_order() -> None:
    settings = TrainSettings(STEPS, 6, 0, micro_batch_size=2)
    batches = Batches(Toy(), {"data": images()}, settings, CPU)
    parts = batches.of_step(5)
    assert [part.index.tolist() for part in parts] == [[30, 31], [32, 33], [34, 35]]
    whole = batches.of_samples(5, torch.arange(30, 36))
    assert torch.equal(torch.cat([part.data[0] for part in parts]), whole.data[0])
    assert torch.equal(
        torch.cat([part.normal("eps", (4,)) for part in parts]), whole.normal("eps", (4,))
    )
    assert torch.equal(torch.cat([part.uniform("t") for part in parts]), whole.uniform("t"))
    assert not torch.equal(
        batches.of_samples(6, torch.arange(30, 36)).normal("eps", (4,)), whole.normal("eps", (4,))
    )


def arrays(count: int = 20) -> ImageSet:
    """The same kind of images in a reader, as those of files are."""
    pixels = (torch.arange(count * 4) * 37 % 256).to(torch.uint8).reshape(count, 2, 2, 1)
    labels = torch.arange(count) % 3
    return ImageSet(Arrays(pixels.numpy(), labels, (1, 2, 2)), labels)


@pytest.mark.parametrize("flip", [False, True])
def test_images_from_files_are_read_ahead_and_are_the_same(flip: bool) -> None:
    """In order, and after a jump to another step; a failing thread would raise here."""
    settings = TrainSettings(STEPS, 6, 0, micro_batch_size=2)
    files = replace(arrays(), flip=flip)
    memory = replace(files, images=files.images[:])
    ahead, plain = (Batches(Toy(), {"data": data}, settings, CPU) for data in (files, memory))
    assert (ahead.from_files, plain.from_files) == (True, False)
    for step in (0, 1, 2, 7, 8, 3):
        for found, expected in zip(ahead.of_step(step), plain.of_step(step), strict=True):
            assert torch.equal(found.data[0], expected.data[0])
            assert torch.equal(found.data[1].labels, expected.data[1].labels)


def test_mirroring_is_a_keyed_choice_of_step_and_sample() -> None:
    """About half are mirrored, others in each step, and micro-batches agree with the whole."""
    labels, pixels = torch.arange(4), torch.arange(16.0).reshape(4, 1, 2, 2)
    data = ImageSet(pixels, labels, flip=True)
    settings = TrainSettings(STEPS, 64, 0)
    whole, parts = (
        Batches(Toy(), {"data": data}, TrainSettings(STEPS, 64, 0, micro_batch_size=size), CPU)
        for size in (None, 16)
    )
    masks = []
    for step in range(4):
        (batch,) = whole.of_step(step)
        plain = pixels[batch.data[1].classes]
        mirrored = (batch.data[0] == plain.flip(3)).flatten(1).all(1)
        assert torch.equal(batch.data[0][~mirrored], plain[~mirrored])
        cut = torch.cat([part.data[0] for part in parts.of_step(step)])
        assert torch.equal(cut, batch.data[0])
        masks.append(mirrored)
    assert 0.35 < torch.stack(masks).double().mean() < 0.65
    assert not torch.equal(masks[0], masks[1])
    plain = Batches(Toy(), {"data": replace(data, flip=False)}, settings, CPU).of_step(0)[0]
    assert torch.equal(plain.data[0], pixels[plain.data[1].classes])


# curve and bill


def test_the_curve_has_every_tenth_step_and_the_last() -> None:
    training = trainer(Toy(), total_steps=25, log_every=10)
    reported: list[int] = []
    training.train(progress=lambda done, total: reported.append(done))
    assert [point["step"] for point in training.curve] == reported == [10, 20, 25]
    assert all(point["loss"] == pytest.approx(point["plain"]) for point in training.curve)


def test_the_bill(tmp_path: Path) -> None:
    training = trainer(Toy(), tmp_path, micro_batch_size=2)
    training.train()
    bill = training.bill
    assert bill.images == 4 * STEPS
    assert bill.updates == {"layer": STEPS}
    forward = 2 * 4 * 4  # the weight's gradient costs as much; none is needed for the data
    assert bill.flops == 2 * forward * 4 * STEPS
    assert bill.teacher_evaluations == 0
    assert bill.seconds > 0
    assert bill.peak_memory_bytes > 10**7


# two players


class Pair(Method):
    """A student that copies a critic, which moves first and leaves its answer for the student."""

    sources = frozenset({"data"})

    def __init__(self, restart: Collection[str] = ()):
        self.teacher = nn.Conv2d(1, 1, 1).requires_grad_(False)
        self.players, self.restart, self.log = {}, restart, list[Any]()
        for name in ("student", "critic"):
            with keyed_initialisation(0, name):
                layer = nn.Linear(4, 4)
            self.players[name] = Player(
                layer, torch.optim.AdamW(layer.parameters(), 0.1), ema=EMA(layer, 0.5, STEPS)
            )

    def updates(self, step: int) -> Iterable[Update]:
        return [Update("critic", self.critic_loss), Update("student", self.student_loss)]

    def critic_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self._loss("critic", self.teacher(batch.data[0]).flatten(1), batch)

    def student_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self._loss("student", self.players["critic"].module(batch.data[0].flatten(1)), batch)

    def _loss(self, name: str, target: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        on = {
            other
            for other, p in self.players.items()
            for q in p.module.parameters()
            if q.requires_grad
        }
        self.log.append((name, on, self.players["critic"].module.weight.detach().clone()))
        loss = (self.players[name].module(batch.data[0].flatten(1)) - target).square().mean()
        return loss, {"size": torch.tensor(float(len(batch.index)))}

    def end_step(self, step: int, means: dict[str, float]) -> Collection[str]:
        self.log.append(("end", step, means))
        return self.restart


def test_only_the_player_of_an_update_requires_gradients_and_updates_are_applied_in_turn() -> None:
    method = Pair()
    before = method.players["critic"].module.weight.detach().clone()
    trainer(method).train(until=1)
    steps = [entry for entry in method.log if entry[0] != "end"]
    assert all(on == {name} for name, on, _ in steps)
    critic = [weight for name, _, weight in steps if name == "critic"][-1]
    student = [weight for name, _, weight in steps if name == "student"][-1]
    assert torch.equal(critic, before)
    assert not torch.equal(student, before)


def test_metrics_carry_the_players_name() -> None:
    method = Pair()
    training = trainer(method, micro_batch_size=2)
    training.train(until=1)
    beside = {f"{name}/{value}" for name in method.players for value in STEERING}
    assert set(training.curve[0]) - beside == {
        "step",
        "critic/loss",
        "critic/size",
        "student/loss",
        "student/size",
    }
    assert beside < set(training.curve[0])
    assert training.curve[0]["critic/size"] == 2
    assert method.log[-1] == (
        "end",
        0,
        {name: value for name, value in training.curve[0].items() if name not in {"step", *beside}},
    )
    assert training.bill.updates == {"critic": 1, "student": 1}


def test_a_named_player_restarts() -> None:
    method = Pair(restart=("student",))
    trainer(method).train(until=2)
    student, critic = method.players["student"], method.players["critic"]
    assert not student.optimizer.state
    assert critic.optimizer.state
    assert torch.equal(student.ema.module.weight, student.module.weight)
    assert not torch.equal(critic.ema.module.weight, critic.module.weight)


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_teacher_evaluations_are_those_of_the_losses(micro_batch_size: int | None) -> None:
    method = Pair()
    training = trainer(method, teacher=method.teacher, micro_batch_size=micro_batch_size)
    training.train(until=3)
    assert training.bill.teacher_evaluations == 3 * 4


class Carrying(Pair):
    """The critic leaves its target for the student, which looks for it in the same micro-batch."""

    def critic_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert not batch.carry
        batch.carry["index"] = batch.index
        return super().critic_loss(batch)

    def student_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert torch.equal(batch.carry["index"], batch.index)
        return super().student_loss(batch)


def test_what_one_update_carries_reaches_the_next_of_its_micro_batch() -> None:
    trainer(Carrying(), micro_batch_size=2).train(until=2)
