"""Checks that the device computes what the CPU computes.

They cover every method, keyed noise, FID, bf16 and compile.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.device.rows import Rows, Setting, Values, skipped
from harness.diffusion.randomness import Keyed
from harness.methods import METHODS, Method
from harness.metrics.features import classify
from harness.metrics.fidelity import fid
from harness.metrics.latency import captured
from harness.runs.build import sampler_of
from harness.tasks import Task, load_task
from harness.training.case import BATCH, Case, losses, weights
from harness.training.tiny_task import tiny_task

CPU = torch.device("cpu")
STEPS, CHECKPOINT = 3, 2
LOSS_LIMIT, SAMPLE_LIMIT, RESUME_LIMIT, BF16_LIMIT, FID_LIMIT = 1e-3, 1e-3, 0.05, 0.03, 1e-3
GRAPH_LIMIT = 1e-5
"""Largest relative differences.

A resumed run's weights are compared relative to the distance that training moved them.
"""
OPTIONS: dict[str, dict[str, Any]] = {
    "ard": {"history_layers": 2},
    "drifting": {"group": 4},
    "imm": {"group": 2, "gap": 3},
}
"""Options that suit the small task's 3 layers and 4 steps."""
TOY = ("ard", "consistency-distillation", "teacher")


def rows(setting: Setting) -> Rows:
    """Keyed noise, every method, FID, then bf16 and compile."""
    folder = Path(tempfile.mkdtemp())
    task, numbers = flow_task(folder / "task"), itertools.count()

    def case(name: str, device: torch.device) -> Case:
        options = OPTIONS.get(name, {})
        num_steps = min(METHODS[name].default_num_steps, 2)
        return Case(name, task, folder / str(next(numbers)), options, num_steps, device)

    yield "keyed noise", lambda: keyed_noise(setting)
    for name in TOY if setting.toy else METHODS.names():
        yield f"method {name}", lambda name=name: method(name, case, setting.device)  # type: ignore[misc]
    yield "FID", lambda: same_fid(load_task("digits"), setting)
    yield "precision bf16", lambda: variant(case, setting, "bf16", BF16_LIMIT, precision="bf16")
    if setting.toy:
        yield "compile", lambda: skipped("toy sizes: compiling takes longer than all the rest")
    else:
        yield "compile", lambda: variant(case, setting, "compiled", LOSS_LIMIT, compile=True)


def flow_task(folder: Path) -> Task:
    """The contract suite's small task with a teacher that predicts v on a flow.

    Under its own eps teacher, whose weights are random, x_0 grows so large near t = 1 that no loss
    would show an error of the network.
    """
    task = tiny_task(folder)
    flow = {"name": "tiny-flow", "schedule": "flow", "prediction_type": "v"}
    return Task(task.spec.model_copy(update=flow), task.folder)


def keyed_noise(setting: Setting) -> Values:
    """Uniform numbers are equal bit for bit; normal ones but for the rounding of a few in 10^8."""
    index, shape = torch.arange(64 if setting.toy else 4096), (1024,)
    keys, there = Keyed("device", 0), index.to(setting.device)
    uniform, normal = keys.uniform("u", index, shape), keys.normal("n", index, shape)
    drawn = keys.normal("n", there, shape).cpu()
    return {
        "numbers": normal.numel(),
        "unequal_uniform": int((uniform != keys.uniform("u", there, shape).cpu()).sum()),
        "unequal_normal": int((normal != drawn).sum()),
        "largest_difference": float((normal - drawn).abs().max()),
        "seconds_cpu": setting.seconds(lambda: keys.normal("n", index, shape)),
        "seconds_device": setting.seconds(lambda: keys.normal("n", there, shape), 3),
        "limits": {
            "unequal_uniform": 0,
            "unequal_normal": normal.numel() * 1e-6,
            "largest_difference": 1e-6,
        },
    }


def relative(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what is expected."""
    difference = (found.double().cpu() - expected.double().cpu()).square().mean().sqrt()
    return float(difference / expected.double().square().mean().sqrt().clamp(min=1e-12).cpu())


def method(name: str, case: Callable[[str, torch.device], Case], device: torch.device) -> Values:
    """Compares samples and first losses with the CPU, and a resumed run with a straight one.

    The samples are an untrained student's. The resumed run continues from a checkpoint, on the
    device.
    """
    here, there = case(name, CPU), case(name, device)
    built_here, built_there = here.build(), there.build()
    found: Values = {
        "samples": relative(there.sample(built_there), here.sample(built_here)),
        "limits": {"samples": SAMPLE_LIMIT},
    }
    if device.type == "cuda":
        found |= as_graph(there, built_there)
        found["limits"]["graph"] = GRAPH_LIMIT
    if not built_there.players:
        return found
    start = weights(built_there)
    trainer_here, straight = (
        here.trainer(built_here),
        there.trainer(built_there, there.folder / "straight"),
    )
    trainer_here.train(until=1)
    straight.train(until=STEPS)
    first = losses(trainer_here)
    there.trainer(there.build(), there.folder / "parts").train(until=CHECKPOINT)
    resumed = there.build()
    there.trainer(resumed, there.folder / "parts").train(until=STEPS)
    found["losses_cpu"] = first
    found["first_losses"] = relative(
        torch.tensor(losses(straight)[: len(first)]), torch.tensor(first)
    )
    found["resumed"], found["resumed_bit_for_bit"] = apart(
        weights(resumed), weights(built_there), start
    )
    found["samples_finite"] = bool(there.sample(built_there).isfinite().all())
    assert found["samples_finite"], f"samples after {STEPS} steps are not finite"
    found["limits"] |= {"first_losses": LOSS_LIMIT, "resumed": RESUME_LIMIT}
    return found


def as_graph(case: Case, method: Method) -> Values:
    """How far samples of a CUDA graph are from eager ones; 1 if sampling could not be captured."""
    x_T, cond = case.task.evaluation_inputs(0, slice(3))
    x_T, cond = x_T.to(case.device), cond.to(case.device)
    kept: list[Tensor] = []

    def sampled() -> None:
        kept[:] = [sampler_of(method)(x_T, cond, lambda name: x_T)]

    sampled()
    expected, replay = kept[0].clone(), captured(sampled, case.device)
    if replay is None:
        return {"graph": 1.0}
    replay()
    return {"graph": relative(kept[0], expected)}


def apart(
    found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]
) -> tuple[float, bool]:
    """Compares two sets of weights.

    Returns their distance, relative to the distance that training moved the weights, and whether
    they are equal bit for bit.
    """
    distance = (
        sum(
            float((found[key].double() - expected[key].double()).square().sum()) for key in expected
        )
        ** 0.5
    )
    moved = (
        sum(
            float((expected[key].double() - start[key].double()).square().sum()) for key in expected
        )
        ** 0.5
    )
    return distance / moved, distance == 0


def variant(
    case: Callable[[str, torch.device], Case],
    setting: Setting,
    name: str,
    limit: float,
    **settings: Any,
) -> Values:
    """Compares the losses of ARD's first steps under other trainer settings with the plain ones."""
    curves = []
    for more in ({}, settings):
        one = case("ard", setting.device)
        trainer = one.trainer(one.build(), **more)
        seconds = setting.seconds(lambda trainer=trainer: trainer.train(until=STEPS))  # type: ignore[misc]
        curves.append(torch.tensor(losses(trainer)))
    return {
        "difference": relative(curves[1], curves[0]),
        f"seconds_{name}": seconds,
        "batch": BATCH,
        "limits": {"difference": limit},
    }


@contextmanager
def tf32() -> Iterator[None]:
    """Inside, matrix products and convolutions may run in TF32."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32
    cuda.allow_tf32 = cudnn.allow_tf32 = True
    try:
        yield
    finally:
        cuda.allow_tf32, cudnn.allow_tf32 = before


def same_fid(task: Task, setting: Setting) -> Values:
    """FID of one sample set on the CPU, on the device, and on the device with TF32.

    The samples are training images with keyed noise added.
    """
    images, count = task.split.train.images, 400 if setting.toy else 4000
    index = torch.arange(count)
    samples = images[index % len(images)] + 0.3 * Keyed("device", 0).normal(
        "fid", index, task.shape
    )

    def value(device: torch.device) -> float:
        classifier = task.classifier(device)
        return fid(classify(classifier, samples)[0], classify(classifier, images)[0])

    found = {"samples": count, "cpu": value(CPU), "device": value(setting.device)}
    with tf32():
        found["tf32"] = value(setting.device)
    for name in ("device", "tf32"):
        found[f"{name}_difference"] = abs(found[name] / found["cpu"] - 1)
    return found | {"limits": {"device_difference": FID_LIMIT}}
