"""Speed goals of the harness, measured on a device, mostly at the size of DiT-XL/2.

The results are ratios from A/B timing, and rates where FLOPs are known. Weights are random.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.ab import Ratio, compare
from benchmarks.device.checks import tf32
from benchmarks.device.rows import Rows, Setting, Values
from benchmarks.naive import NaiveHistory
from benchmarks.test_speed import STATES, bare_loop, history_network, same_weights, shaken
from harness.data.images import ImageSet
from harness.data.recipe import Recipe, compute
from harness.data.trajectories import open_store
from harness.diffusion.conditions import Condition, Conditions
from harness.diffusion.counting import count_flops
from harness.diffusion.denoiser import Denoiser, Guided
from harness.diffusion.randomness import keyed_initialisation
from harness.machine import peak_flops
from harness.methods import METHODS
from harness.metrics.latency import captured
from harness.networks.backbones import build
from harness.networks.compiling import compile_networks, compiled
from harness.networks.history import EMPTY, History
from harness.runs.cost import paper_problem
from harness.solvers import Trajectory
from harness.tasks import load_task
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

SIZE, TOY_SIZE = "DiT-XL/2", "DiT-S/8"
BATCH = 128
"""Samples of a training step, and trajectories that are made at once."""


def rows(setting: Setting) -> Rows:
    """The benchmarks, the most telling first."""
    yield "matrix products", lambda: matrix_rates(setting)
    yield "DiT-XL/2 training step, bf16, compiled", lambda: training(setting, True)
    yield "DiT-XL/2 trajectories, bf16, compiled", lambda: trajectories(setting)
    yield "ARD pass, N = 6 of 28: the released code's way over ours", lambda: released(setting)
    yield "cached sampling as CUDA graphs: N = 6 over N = 0", lambda: cached_sampling(setting)
    yield "training from files over from the device", lambda: loading(setting)
    yield "trainer over a bare loop, ARD on digits", lambda: trainer_over_loop(setting)
    yield "DiT-XL/2 training step, bf16", lambda: training(setting, False)


def matrix_rates(setting: Setting) -> Values:
    """TFLOPs a second of a square matrix product by type: what the card reaches."""
    size, found = 256 if setting.toy else 8192, {}
    for name, kind, fast in (
        ("fp32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bf16", torch.bfloat16, False),
    ):
        x = torch.randn(size, size, device=setting.device, dtype=kind)
        torch.backends.cuda.matmul.allow_tf32 = fast
        setting.seconds(lambda x=x: x @ x, 2)  # type: ignore[misc]
        found[f"{name}_tflops"] = 2 * size**3 / setting.seconds(lambda x=x: x @ x, 5) / 1e12  # type: ignore[misc]
    torch.backends.cuda.matmul.allow_tf32 = False
    return found | {"size": size}


def side_by_side(
    setting: Setting, a: Callable[[], Any], b: Callable[[], Any], pairs: int = 9
) -> Values:
    """How long B takes over A: the median of the pairs' ratios and its interval."""

    def waited(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            call()
            setting.synchronise()

        return run

    ratio: Ratio = compare(waited(a), waited(b), 3 if setting.toy else pairs, warmup=2)
    return {
        "ratio": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "seconds": list(ratio.seconds),
        "pairs": ratio.pairs,
    }


def rates(setting: Setting, samples: int, flops: float, seconds: float) -> Values:
    """Images and FLOPs a second, and their part of the card's peak (MFU)."""
    cuda = setting.device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name(setting.device)) if cuda else None
    return {
        "batch": samples,
        "seconds": seconds,
        "images_a_second": samples / seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": flops / seconds / peak if peak else None,
        "memory_bytes": torch.cuda.max_memory_allocated(setting.device) if cuda else 0,
    }


def halving(setting: Setting, measure: Callable[[int], Values]) -> Values:
    """What is measured at the largest batch that fits: 128, 64, 32 or 16."""
    batch = 2 if setting.toy else BATCH
    while True:
        gc.collect()
        torch.cuda.empty_cache()
        try:
            return measure(batch)
        except torch.cuda.OutOfMemoryError:
            if batch <= 16:
                raise
        batch //= 2


def paper_trainer(setting: Setting, batch: int, compile: bool) -> Trainer:
    """Teacher training on random latents of 256 x 256 images."""
    problem: Any = paper_problem(TOY_SIZE if setting.toy else SIZE, 256, True, 1000, 50)
    problem.network_options["learn_sigma"] = False
    with torch.device(setting.device):
        method = METHODS["denoising"](METHODS["denoising"].Config(), None, problem, 50, 1000)
        images = ImageSet(torch.randn(1024, *problem.shape), torch.arange(1024) % 1000)
    for player in method.players.values():
        shaken(player.module)
    settings = TrainSettings(1000, batch, 0, precision="bf16", compile=compile)
    return Trainer(method, {"data": images}, settings, None, setting.device)


def training(setting: Setting, compile: bool) -> Values:
    """Images a second of a training step, and the MFU."""

    def measure(batch: int) -> Values:
        trainer = paper_trainer(setting, batch, compile and not setting.toy)
        trainer.train(until=3)  # counted, compiled and warmed up
        steps = 1 if setting.toy else 10
        seconds = setting.seconds(lambda: trainer.train(until=trainer.step + steps)) / steps
        flops = trainer.flops_of(list(trainer.method.updates(0)))
        return rates(setting, batch, flops, seconds)

    return halving(setting, measure)


def recipe_of(shape: tuple[int, int, int], count: int, steps: int) -> Recipe:
    """Trajectories of random weights with the guidance of DiT's own FID."""
    return Recipe(
        "random", "vp", "eps", 1.5, 3, "ddim", steps, count, 0, shape, 1000,
        precision="bf16", compile=True,
    )  # fmt: skip


def guided_teacher(problem: Any, setting: Setting) -> Guided:
    """A guided teacher of random weights."""
    with torch.device(setting.device):
        network = shaken(build(problem.network_options)).eval().requires_grad_(False)
    denoiser = Denoiser(network, problem.schedule, "eps")
    return Guided(denoiser, 1.5, Condition(torch.tensor([1000])), channels=3)


@torch.no_grad()
def trajectories(setting: Setting) -> Values:
    """Guided trajectories a second, and the MFU of making them."""
    problem: Any = paper_problem(TOY_SIZE if setting.toy else SIZE, 256, True, 1000, 50)
    teacher, steps = guided_teacher(problem, setting), 4

    def measure(batch: int) -> Values:
        recipe = recipe_of(problem.shape, batch, steps)

        def made(count: int) -> None:
            compute(recipe, Conditions(1000), teacher, torch.arange(count), setting.device)

        flops = count_flops(lambda: made(1)) * batch
        with compiled(teacher, not setting.toy):
            made(batch)
            seconds = setting.seconds(lambda: made(batch), 1 if setting.toy else 4)
        return rates(setting, batch, flops, seconds) | {"evaluations": steps}

    return halving(setting, measure)


def history_inputs(batch: int, setting: Setting) -> tuple[Tensor, Tensor, Condition]:
    """Noise in four states [B, S, 4, 32, 32], their times [B, S] and conditions."""
    x = torch.randn(batch, STATES, 4, 32, 32, device=setting.device)
    t = torch.tensor([999.0, 749.0, 499.0, 249.0]).to(setting.device).expand(batch, -1)
    return x, t, Condition(torch.arange(batch, device=setting.device))


def released(setting: Setting) -> Values:
    """A forward and backward pass: a dense mask over all states, adaLN once a token and TF32,
    against ours in bf16, compiled. The ratio of both in eager bf16 stands beside."""
    size, layers, batch = (TOY_SIZE, 3, 1) if setting.toy else (SIZE, 6, 8)
    with torch.device(setting.device):
        network = history_network(size, layers)
    naive, (x, t, cond) = NaiveHistory(network), history_inputs(batch, setting)

    def step(forward: Callable[[], Tensor], bf16: bool) -> None:
        network.zero_grad(set_to_none=True)
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=bf16):
            loss = forward().square().mean()
        loss.backward()

    def theirs(bf16: bool) -> None:
        with tf32():
            step(lambda: naive(x, t, cond), bf16)

    def ours() -> None:
        step(lambda: network(x, t, cond)[0], True)

    eager = side_by_side(setting, ours, lambda: theirs(True), 5)
    if not setting.toy:
        compile_networks([network])
    return side_by_side(setting, ours, lambda: theirs(False)) | {
        "batch": batch,
        "both_eager_bf16": {name: eager[name] for name in ("ratio", "low", "high", "seconds")},
    }


@torch.no_grad()
def cached_sampling(setting: Setting) -> Values:
    """Sampling in 4 steps under bf16 autocast, by batch; eager where there are no CUDA graphs."""
    found: Values = {}
    with torch.device(setting.device):
        networks = same_weights(TOY_SIZE if setting.toy else SIZE, 0, 6)
    for batch in (1,) if setting.toy else (16, 1):
        x, t, cond = history_inputs(batch, setting)

        def sample(network: History, x: Tensor = x, t: Tensor = t, cond: Any = cond) -> None:
            cache = EMPTY
            with torch.autocast(setting.device.type, torch.bfloat16):
                for state in range(STATES):
                    at = slice(state, state + 1)
                    _, cache = network(x[:, at], t[:, at], cond, cache)

        calls = [lambda network=network: sample(network) for network in networks]
        graphs = [captured(call, setting.device) for call in calls]
        pair = [graph or call for graph, call in zip(graphs, calls, strict=True)]
        values = side_by_side(setting, pair[0], pair[1], 15)
        key = "" if batch > 1 or setting.toy else "_of_one"
        found |= {f"{name}{key}": value for name, value in values.items()}
        found[f"graphs{key}"] = all(graphs)
    return found


class Kept:
    """A source whose only batch lies on the device."""

    def __init__(self, batch: Trajectory):
        self.kept = batch

    def __len__(self) -> int:
        return len(self.kept.states)

    def batch(self, items: Tensor) -> Trajectory:
        return self.kept


def loading(setting: Setting) -> Values:
    """ARD of DiT-B/2 in bf16 from mapped trajectory files, over a batch that is on the device."""
    problem: Any = paper_problem(TOY_SIZE if setting.toy else "DiT-B/2", 256, True, 1000, STATES)
    small: Any = paper_problem(TOY_SIZE, 256, True, 1000, STATES)
    count, steps = (8, 1) if setting.toy else (512, 5)
    size = 2 if setting.toy else 64
    recipe = replace(recipe_of(problem.shape, count, STATES), compile=False)
    store = open_store(recipe, guided_teacher(small, setting), setting.device)
    kept = Kept(store.batch(torch.arange(size)).to(setting.device))
    trainers = []
    for source in (kept, store):
        with torch.device(setting.device):
            config = METHODS["ard"].Config(history_layers=6)  # type: ignore[call-arg]
            teacher = guided_teacher(problem, setting)
            method = METHODS["ard"](config, teacher, problem, STATES, 1000)
        method.to(setting.device)
        settings = TrainSettings(1000, size, 0, precision="bf16")
        trainers.append(Trainer(method, {"trajectory": source}, settings, None, setting.device))
    for trainer in trainers:
        trainer.train(until=2)
    device, files = trainers
    return side_by_side(
        setting,
        lambda: device.train(until=device.step + steps),
        lambda: files.train(until=files.step + steps),
    ) | {"batch": size, "bytes_a_step": size * recipe.size, "steps": steps}


def trainer_over_loop(setting: Setting) -> Values:
    """ARD on digits at batch 64, in rounds of 20 steps."""
    task, steps, device = load_task("digits"), 1 if setting.toy else 20, setting.device
    teacher = task.teacher(device)
    store = open_store(replace(task.recipe, count=64), teacher, device)
    trainers = []
    for _ in range(2):
        with keyed_initialisation(0, "student"):
            method = METHODS["ard"](METHODS["ard"].Config(), teacher, task, STATES, 1000)
        method.to(device)
        trainers.append(
            Trainer(
                method,
                {"trajectory": store},
                TrainSettings(1000, 8 if setting.toy else 64, 0),
                None,
                device,
            )
        )
    bare, ours = trainers
    for trainer in trainers:
        trainer.train(until=1)  # both have counted their FLOPs
    done = iter(range(1, 1000, steps))
    return side_by_side(
        setting,
        lambda: bare_loop(bare.method, bare, next(done), steps),
        lambda: ours.train(until=ours.step + steps),
    )
