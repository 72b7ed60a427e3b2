"""Speed goals of the harness, measured on a device.

The results are ratios from A/B timing, and rates where FLOPs are known.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.ab import Ratio, compare
from benchmarks.device.rows import Rows, Setting, Values, skipped
from benchmarks.device.teacher import BATCH, Mode, step_of, teacher_task
from benchmarks.naive import NaiveHistory
from benchmarks.test_speed import STATES, bare_loop, history_network, same_weights
from harness.data.images import ImageSet
from harness.data.trajectories import open_store
from harness.diffusion.conditions import Condition
from harness.diffusion.denoiser import Denoiser
from harness.diffusion.randomness import keyed_initialisation
from harness.diffusion.schedules import few_step_levels
from harness.methods import METHODS
from harness.networks.history import EMPTY, History
from harness.runs.cost import paper_problem
from harness.solvers import DDIM, sample
from harness.tasks import load_task
from harness.training.settings import TrainSettings
from harness.training.trainer import Trainer

PEAKS = {
    "H100 80GB HBM3": 989e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""Dense bf16 FLOPs a second by words in a card's name, from the makers' data sheets."""
COMPILE_SECONDS = 50


def rows(setting: Setting) -> Rows:
    """The benchmarks; the longest are last, where time may be short."""
    yield "matrix products", lambda: matrix_rates(setting)
    yield "teacher step: keyed noise, bf16 and fp32", lambda: teacher_steps(setting)
    yield "DiT-B/4 training step, bf16", lambda: paper_training(setting, compile=False)
    yield "DiT-B/4 sampling in 4 steps, bf16", lambda: paper_sampling(setting)
    yield "ARD training step, N = 3 of 12: naive over ours", lambda: naive_over_ours(setting)
    yield "cached sampling: N = 6 over N = 0", lambda: cached_sampling(setting)
    yield "trainer over a bare loop, ARD on digits", lambda: trainer_over_loop(setting)
    yield "DiT-B/4 training step, bf16, compiled", lambda: compiled_training(setting)


def matrix_rates(setting: Setting) -> Values:
    """TFLOPs a second of a square matrix product by type: what the card reaches."""
    size, found = 256 if setting.toy else 8192, {}
    for name, kind, tf32 in (
        ("fp32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bf16", torch.bfloat16, False),
    ):
        x = torch.randn(size, size, device=setting.device, dtype=kind)
        torch.backends.cuda.matmul.allow_tf32 = tf32
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


def history_inputs(batch: int, setting: Setting) -> tuple[Tensor, Tensor, Condition]:
    """Noise in four states [B, S, 4, 32, 32], their times [B, S] and conditions."""
    x = torch.randn(batch, STATES, 4, 32, 32, device=setting.device)
    t = torch.tensor([999.0, 749.0, 499.0, 249.0]).to(setting.device).expand(batch, -1)
    return x, t, Condition(torch.arange(batch, device=setting.device))


def naive_over_ours(setting: Setting) -> Values:
    """DiT-S/2, 4 states of 256 tokens: forward and backward, in float32."""
    size, batch = ("DiT-S/8", 1) if setting.toy else ("DiT-S/2", 16)
    with torch.device(setting.device):
        network = history_network(size, 3)
    naive, (x, t, cond) = NaiveHistory(network), history_inputs(batch, setting)

    def step(forward: Callable[[], Tensor]) -> None:
        network.zero_grad(set_to_none=True)
        forward().square().mean().backward()

    return side_by_side(
        setting,
        lambda: step(lambda: network(x, t, cond)[0]),
        lambda: step(lambda: naive(x, t, cond)),
    ) | {"batch": batch}


@torch.no_grad()
def cached_sampling(setting: Setting) -> Values:
    """DiT-XL/2, 4 steps, under bf16 autocast."""
    size, batch = ("DiT-S/8", 1) if setting.toy else ("DiT-XL/2", 16)
    with torch.device(setting.device):
        without, with_six = same_weights(size, 0, 6)
    x, t, cond = history_inputs(batch, setting)

    def sample(network: History) -> None:
        cache = EMPTY
        with torch.autocast(setting.device.type, torch.bfloat16):
            for state in range(STATES):
                _, cache = network(x[:, state : state + 1], t[:, state : state + 1], cond, cache)

    return side_by_side(setting, lambda: sample(without), lambda: sample(with_six)) | {
        "batch": batch
    }


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


def teacher_steps(setting: Setting) -> Values:
    """Seconds per training step of the last part's teacher in fp32 and bf16, uncompiled."""
    task, size = teacher_task(setting), 16 if setting.toy else BATCH
    found: Values = {"batch": size}
    for mode in (Mode("fp32", False), Mode("bf16", False)):
        step = step_of(task, mode, size, setting)
        step()
        found[f"{mode.precision}_seconds"] = setting.seconds(step, 1 if setting.toy else 20)
    return found | {"bf16_over_fp32": found["bf16_seconds"] / found["fp32_seconds"]}


def paper_trainer(setting: Setting, batch: int, compile: bool) -> Trainer:
    """Teacher training of DiT-B/4 on random latents of 256 x 256 images."""
    problem: Any = paper_problem("DiT-S/8" if setting.toy else "DiT-B/4", 256, True, 1000, 50)
    problem.network_options["learn_sigma"] = False
    with torch.device(setting.device):
        method = METHODS["denoising"](METHODS["denoising"].Config(), None, problem, 50, 1000)
        images = ImageSet(torch.randn(1024, *problem.shape), torch.arange(1024) % 1000)
    settings = TrainSettings(1000, batch, 0, precision="bf16", compile=compile)
    return Trainer(method, {"data": images}, settings, None, setting.device)


@cache
def largest_batch(setting: Setting) -> int:
    """A multiple of 64 that fills four fifths of the card, from what 64 and 128 samples take."""
    if setting.device.type != "cuda":
        return 2
    peaks = []
    for batch in (64, 128):
        paper_trainer(setting, batch, False).train(until=2)
        peaks.append(torch.cuda.max_memory_allocated(setting.device))
        gc.collect()
    total = torch.cuda.get_device_properties(setting.device).total_memory
    each = (peaks[1] - peaks[0]) / 64
    return 128 + max(int((0.8 * total - peaks[1]) / each) // 64 * 64, 0)


def paper_training(setting: Setting, compile: bool) -> Values:
    """Images a second of a training step, and the MFU; a batch that does not fit is halved."""
    batch = largest_batch(setting)
    while True:
        try:
            return paper_step(setting, batch, compile)
        except torch.cuda.OutOfMemoryError:
            if batch <= 64:
                raise
        batch //= 2
        gc.collect()
        torch.cuda.empty_cache()


def paper_step(setting: Setting, batch: int, compile: bool) -> Values:
    """The same at one batch."""
    trainer = paper_trainer(setting, batch, compile)
    trainer.train(until=2)  # counted, compiled and warmed up
    steps = 1 if setting.toy else 8
    seconds = setting.seconds(lambda: trainer.train(until=trainer.step + steps)) / steps
    flops = trainer.flops_of(list(trainer.method.updates(0)))
    memory = torch.cuda.max_memory_allocated(setting.device) if setting.device.type == "cuda" else 0
    return {
        "batch": batch,
        "seconds": seconds,
        "images_a_second": batch / seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": mfu(flops / seconds, setting),
        "memory_bytes": memory,
    }


def compiled_training(setting: Setting) -> Values:
    """The same compiled, where there is time to compile."""
    if setting.toy or setting.seconds_left < COMPILE_SECONDS:
        return skipped(f"compiling takes up to {COMPILE_SECONDS} s")
    return paper_training(setting, compile=True)


def mfu(rate: float, setting: Setting) -> float | None:
    """FLOPs a second over the peak of the card, where that is known."""
    card = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "cpu"
    return next((rate / peak for words, peak in PEAKS.items() if words in card), None)


@torch.no_grad()
def paper_sampling(setting: Setting) -> Values:
    """Images a second in 4 network passes, without guidance and autoencoder."""
    batch = 2 if setting.toy else 1024
    trainer = paper_trainer(setting, batch, False)
    method: Any = trainer.method
    student: Denoiser = method.student
    x, cond = (
        torch.randn(batch, *method.task.shape, device=setting.device),
        Condition(torch.arange(batch, device=setting.device) % 1000),
    )

    def sample_batch() -> None:
        with torch.autocast(setting.device.type, torch.bfloat16):
            sample(DDIM(), student, x, few_step_levels(4), cond)

    sample_batch()
    seconds = setting.seconds(sample_batch, 1 if setting.toy else 5)
    return {"batch": batch, "nfe": 4, "seconds": seconds, "images_a_second": batch / seconds}
