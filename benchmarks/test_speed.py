"""Speed goals of the harness, as ratios from A/B timing.

`pytest benchmarks` takes about 5 minutes on 2 idle cores. A test fails if the interval of its ratio
excludes the goal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from benchmarks.ab import compare
from benchmarks.naive import NaiveHistory
from harness.data.images import ImageSet
from harness.data.trajectories import open_store
from harness.diffusion.conditions import Condition
from harness.diffusion.randomness import Keyed, keyed_initialisation
from harness.methods import METHODS
from harness.methods.base import Player
from harness.metrics.compute import count_macs
from harness.networks.backbones import build
from harness.networks.history import EMPTY, History, with_history
from harness.tasks import load_task
from harness.training.batches import Source
from harness.training.estimate import Blank
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

CPU = torch.device("cpu")
STATES = 4
M = TypeVar("M", bound=nn.Module)


def history_network(size: str, history_layers: int) -> History:
    """A history student of one of the paper's sizes on 32 x 32 latents."""
    with keyed_initialisation(0, size):
        options = {"size": size, "image_size": 32, "in_channels": 4, "num_classes": 1000}
        return shaken(with_history(build(options), STATES, history_layers))


def shaken(network: M) -> M:
    """A DiT whose gates are open: a fresh one multiplies by zeros and outputs them."""
    for name, parameter in network.named_parameters():
        if "adaLN" in name or name.startswith("final_layer"):
            nn.init.normal_(parameter, std=0.02)
    return network


def same_weights(size: str, *history_layers: int) -> list[History]:
    """Networks with other numbers of history layers that share one set of weights."""
    networks = [history_network(size, layers).eval() for layers in history_layers]
    for network in networks[1:]:
        network.load_state_dict(networks[0].state_dict(), assign=True)
    return networks


def inputs(batch: int) -> tuple[Tensor, Tensor, Condition]:
    x = Keyed("benchmark", 0).normal("x", torch.arange(batch), (STATES, 4, 32, 32))
    return (
        x,
        torch.tensor([999.0, 749.0, 499.0, 249.0]).expand(batch, -1),
        Condition(torch.arange(batch)),
    )


def test_training_step_against_a_naive_one(found: Callable[..., None]) -> None:
    """DiT-S/2, N = 3 of 12 layers, 4 states of 256 tokens: forward, backward."""
    network = history_network("DiT-S/2", 3)
    naive, (x, t, cond) = NaiveHistory(network), inputs(1)
    with torch.no_grad():
        torch.testing.assert_close(naive(x, t, cond), network(x, t, cond)[0], rtol=1e-3, atol=1e-4)

    def step(forward: Callable[[], Tensor]) -> None:
        network.zero_grad(set_to_none=True)
        forward().square().mean().backward()

    ours, theirs = (
        (lambda: step(lambda: network(x, t, cond)[0])),
        (lambda: step(lambda: naive(x, t, cond))),
    )
    ratio = compare(ours, theirs, pairs=9)
    found(
        "ARD training step, DiT-S/2, N = 3: naive over ours",
        ratio,
        ">= 1.7",
        (count_macs(ours), count_macs(theirs)),
    )
    assert ratio.high >= 1.7


@torch.no_grad()
def test_cached_sampling_against_step_distillation(found: Callable[..., None]) -> None:
    """DiT-XL/2, N = 6 of 28 layers, 4 steps, one sample."""
    without, with_six = same_weights("DiT-XL/2", 0, 6)
    x, t, cond = inputs(1)

    def sample(network: History) -> None:
        cache = EMPTY
        for state in range(STATES):
            _, cache = network(x[:, state : state + 1], t[:, state : state + 1], cond, cache)

    plain, history = (lambda: sample(without)), (lambda: sample(with_six))
    ratio = compare(plain, history, pairs=7)
    found(
        "cached sampling, DiT-XL/2: N = 6 over N = 0",
        ratio,
        "<= 1.03",
        (count_macs(plain), count_macs(history)),
    )
    assert ratio.low <= 1.03


def bare_loop(method: Any, trainer: Trainer, first: int, steps: int) -> None:
    """What a script would do: batch, loss, backward, clip, step, average."""
    player: Player = method.players["student"]
    parameters = list(player.module.parameters())
    for step in range(first, first + steps):
        (batch,) = trainer.batches.of_step(step)
        loss, _ = method.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in player.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * player.rate(
                (step + 1) / trainer.settings.total_steps
            )
        player.optimizer.step()
        player.optimizer.zero_grad(set_to_none=True)
        assert player.ema is not None
        player.ema.update(player.module)


def test_trainer_against_a_bare_loop(
    found: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """ARD on digits at batch 64, 10 steps a round."""
    task, steps = load_task("digits"), 10
    store = open_store(task.recipe, task.teacher(CPU), CPU)
    trainers = []
    for name in ("bare", "trainer"):
        with keyed_initialisation(0, "student"):
            method = METHODS["ard"](METHODS["ard"].Config(), task.teacher(CPU), task, STATES, 1000)
        settings = TrainSettings(1000, 64, 0)
        trainers.append(
            Trainer(method, {"trajectory": store}, settings, tmp_path_factory.mktemp(name), CPU)
        )
    bare, ours = trainers
    bare.train(until=1)  # both have counted their FLOPs
    ours.train(until=1)
    done = {"bare": 1}

    def loop() -> None:
        bare_loop(bare.method, bare, done["bare"], steps)
        done["bare"] += steps

    def one_round() -> None:
        checkpoint = ours.folder / "checkpoint" / "state.pt" if ours.folder else None
        if checkpoint:
            # train() would resume from a checkpoint; without one it just continues.
            checkpoint.unlink(missing_ok=True)
        ours.train(until=ours.step + steps)

    ratio = compare(loop, one_round, pairs=11)
    found("trainer over a bare loop, ARD on digits", ratio, "<= 1.03")
    assert ratio.low <= 1.03


def training(name: str, **settings: Any) -> Callable[[], None]:
    """A training step on Fashion-MNIST at batch 64.

    Random images and blank trajectories keep the cost of the data out of it.
    """
    task, cls = load_task("fashion-mnist"), METHODS[name]
    with keyed_initialisation(0, name):
        method = cls(cls.Config(), task.teacher(CPU), task, STATES, 1000)
    images = torch.rand(64, *task.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sources: dict[str, Source] = {
        "data": ImageSet(images, torch.arange(64) % task.num_classes),
        "trajectory": Blank(task.recipe, task.conditions),
    }
    trainer = Trainer(method, sources, TrainSettings(1000, 64, 0, **settings), None, CPU)
    return lambda: trainer.train(until=trainer.step + 1)


@pytest.mark.parametrize("name", ["denoising", "step-distillation"])
@pytest.mark.parametrize(
    ("how", "settings"),
    [("torch.compile", {"compile": True}), ("bf16 autocast", {"precision": "bf16"})],
)
def test_training(
    name: str, how: str, settings: dict[str, Any], found: Callable[..., None]
) -> None:
    """Training a teacher and a 4-step student, with torch.compile or bf16 over neither.

    There is no goal.
    """
    found(
        f"{name}, Fashion-MNIST: {how} over neither",
        compare(training(name), training(name, **settings), warmup=3),
        "none",
    )


def test_loading(found: Callable[..., None]) -> None:
    """64 Fashion-MNIST trajectories from memory-mapped files, over the same from memory."""
    task = load_task("fashion-mnist")
    store = open_store(replace(task.recipe, count=256), task.teacher(CPU), CPU, shard_size=64)
    whole, items = (
        store.batch(torch.arange(256)),
        Keyed("benchmark", 0).permutation("items", 256)[:64],
    )
    ratio = compare(
        lambda: (whole.states[items], whole.predictions[items]),
        lambda: store.batch(items),
        pairs=51,
        warmup=5,
    )
    found("64 trajectories, Fashion-MNIST: from mapped files over from memory", ratio, "none")


@torch.no_grad()
def test_guidance(found: Callable[..., None]) -> None:
    """A guided teacher's two evaluations as one batch, over one after the other."""
    task = load_task("fashion-mnist")
    network = build(task.network_options)
    guided, index = task.guided(network).at(1.5), torch.arange(250)
    x, cond, t = (
        Keyed("benchmark", 0).normal("x", index, task.shape),
        Condition(index % task.num_classes),
        torch.tensor(0.5),
    )
    without = cond.replaced(torch.ones(len(index), dtype=torch.bool), task.null)
    ratio = compare(
        lambda: (guided.denoiser(x, t, cond), guided.denoiser(x, t, without)),
        lambda: guided(x, t, cond),
        pairs=11,
    )
    found("a guided evaluation of 250 images, Fashion-MNIST: one batch over two", ratio, "none")
